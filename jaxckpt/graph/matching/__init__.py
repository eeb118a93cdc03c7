"""The steps of a match: patterns and rules, renames, transforms, comparisons, hints."""

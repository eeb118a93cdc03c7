"""Changes to a manifest of `{"w": float32[2, 3], "n": 3, "m": [float32[2, 3]]}` that make it nonsense."""


def graph_of(document):
    return document["graph"]["graphs"][0]


def deep(document, depth):
    graph = graph_of(document)
    graph["structure"] = [["list", "", False, 1, [["0", "index"]]]] * depth + [0]


HOSTILE = {
    "no graph": lambda d: d["graph"].update(graphs=[]),
    "a number too many": lambda d: graph_of(d)["leaves"][0].append(1),
    "a wrong type": lambda d: graph_of(d)["leaves"][0].__setitem__(1, "x"),
    "a missing field": lambda d: graph_of(d).pop("nodes"),
    "dangling edge": lambda d: graph_of(d)["edges"][0].__setitem__(2, 99),
    "negative edge": lambda d: graph_of(d)["edges"][0].__setitem__(0, -1),
    "a circle": lambda d: graph_of(d)["edges"].append([1, "x", 0]),
    "a loop": lambda d: graph_of(d)["edges"].append([1, "x", 1]),
    "no such node": lambda d: graph_of(d)["leaves"][0].__setitem__(1, 99),
    "no such spec": lambda d: graph_of(d)["leaves"][0].__setitem__(2, 99),
    "no such state": lambda d: graph_of(d)["leaves"][0].__setitem__(3, -2),
    "one key twice": lambda d: graph_of(d)["leaves"][0].__setitem__(0, "n"),
    "dangling slot": lambda d: graph_of(d)["slots"][0].__setitem__(1, "gone"),
    "left out": lambda d: graph_of(d).update(left_out=-1),
    "a leaf too few": lambda d: graph_of(d)["structure"].pop(),
    "a leaf twice": lambda d: graph_of(d)["structure"].append(0),
    "two roots": lambda d: graph_of(d)["structure"].append(["list", "", False, 0, []]),
    "children that are not there": lambda d: graph_of(d)["structure"][0].__setitem__(3, 1 << 40),
    "names that are not there": lambda d: graph_of(d)["structure"][0][4].pop(),
    "a strange name": lambda d: graph_of(d)["structure"][0][4].__setitem__(0, ["w", "later"]),
    "endless depth": lambda d: deep(d, 200_000),
    "too many axes": lambda d: graph_of(d)["specs"][0].update(shape=[1] * 99),
    "a negative axis": lambda d: graph_of(d)["specs"][0].update(shape=[-1, 3]),
    "an endless axis": lambda d: graph_of(d)["specs"][0].update(shape=[1 << 62, 3]),
    "an endless array": lambda d: graph_of(d)["specs"][0].update(shape=[1 << 40, 1 << 40]),
    "a shard of another rank": lambda d: graph_of(d)["specs"][0].update(sharding={"shard_shape": [1]}),
    "a key without bits": lambda d: graph_of(d)["specs"][0].update(array_type="key"),
    "no integer": lambda d: graph_of(d)["specs"][1].update(value="3.5"),
    "an endless integer": lambda d: graph_of(d)["specs"][1].update(value="9" * 5000),
    "no value": lambda d: graph_of(d)["specs"][1].pop("value"),
    "no float": lambda d: graph_of(d)["specs"][1].update(type="float", value="0x1p99999999999"),
    "no complex": lambda d: graph_of(d)["specs"][1].update(type="complex", value="0x1p0"),
    "no bytes": lambda d: graph_of(d)["specs"][1].update(type="bytes", value="é"),
    "no bool": lambda d: graph_of(d)["specs"][1].update(type="bool", value="yes"),
    "no entry": lambda d: d["graph"]["entries"].pop(),
    "an entry twice": lambda d: d["graph"]["entries"].append(d["graph"]["entries"][0]),
    "one storage key twice": lambda d: d["graph"]["entries"][0].update(key="m.0"),
    "an entry of no leaf": lambda d: d["graph"]["entries"][0].update(owner=[99]),
    "an entry of nothing": lambda d: d["graph"]["entries"][0].update(owner=[]),
    "an entry of a value": lambda d: d["graph"]["entries"][0].update(owner=[1]),
    "an alias of a value": lambda d: d["graph"]["entries"][0].update(aliases=[1]),
    "a digest too short": lambda d: d["graph"]["entries"][0].update(digest="00"),
    "an empty chunk": lambda d: d["graph"]["entries"][0].update(chunk_shape=[0, 3]),
    "a chunk too large": lambda d: d["graph"]["entries"][0].update(chunk_shape=[2, 4]),
    "a chunk of another rank": lambda d: d["graph"]["entries"][0].update(chunk_shape=[2]),
    "bytes of an array": lambda d: d["graph"]["entries"][0].update(bytes=5),
    "a file elsewhere": lambda d: d["files"]["tables"].update({"../x": "0" * 32}),
    "a negative size": lambda d: d["files"]["others"].update({"x": [-1, "0" * 32]}),
    "a digest of a table": lambda d: d["files"]["tables"].update({"x": "z" * 32}),
    "a state of nobody": lambda d: d["graph"]["graphs"].append(graph_of(d)),
    "metadata": lambda d: d["graph"].update(metadata={"$int": "zz"}),
    "more metadata": lambda d: d["graph"].update(metadata={"$dict": [1]}),
    "metrics": lambda d: d["files"].update(metrics=[1]),
}

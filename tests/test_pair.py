"""The two scripts are one: what is not about distribution is the same to the letter, in the same order."""

import ast

from conftest import ROOT

# What distribution changes, and why.
DIFFER = {
    "build_parser": "--report",
    "log": "only rank 0 speaks",
    "select_device": "a GPU for each local rank",
    "synchronize": "a barrier: all ranks start and stop the clock together",
    "backward": "the weight of a rank's share; one exchange in a step",
    "read_losses": "the sum over the ranks; all stop at the same step",
    "optimize": "a rank loads its share of each batch",
    "write_scalars": "only rank 0 writes",
    "train": "only rank 0 has a progress bar",
    "warm_up": "a rank's share",
    "measure_step": "with and without the exchange; the slowest rank",
    "evaluate": "each question on one rank",
    "write_atomically": "only rank 0 writes",
    "write_checkpoint": "all ranks learn whether it could be written",
    "random_states": "those of all ranks",
    "load_checkpoint": "a rank's own random state",
    "start_or_resume": "all ranks must find the same checkpoint",
    "gather_workers": "the largest times, all hosts",
    "main": "joining and leaving the group, wrapping in DDP, the report",
}
ADDED = ["join_group", "explain_timeout", "share_of", "gather"]  # and what follows the heading "scaling"


def definitions(script):
    source = (ROOT / script).read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}, source


def test_shared_functions_are_the_same_to_the_letter_and_in_order():
    (baseline, _), (distributed, source) = definitions("baseline.py"), definitions("distributed.py")
    different = {name for name in baseline if baseline[name] != distributed.get(name)}
    assert different == set(DIFFER)
    added = [name for name in distributed if name not in baseline]
    assert added[: len(ADDED)] == ADDED
    scaling = source.index("\n# scaling -")
    assert all(source.index(f"\ndef {name}(") > scaling for name in added[len(ADDED) :])
    assert [name for name in distributed if name in baseline] == list(baseline)


def test_constants_and_rooms_are_the_same():
    def constants(script):
        body = ast.parse((ROOT / script).read_text()).body
        return {ast.unparse(node) for node in body if isinstance(node, ast.Assign)}

    assert constants("baseline.py") <= constants("distributed.py")
    rooms = ["options", "processes", "data", "model", "training", "answers", "checkpoints", "record"]
    headings = [
        [
            line.split()[1]
            for line in (ROOT / script).read_text().splitlines()
            if line.startswith("# ") and "-----" in line
        ]
        for script in ("baseline.py", "distributed.py")
    ]
    assert headings == [rooms, [*rooms, "scaling"]]

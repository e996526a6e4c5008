"""The two scripts are one: what is not about distribution is the same to the letter, in the same order."""

import ast

import pytest
from torch.distributed.run import get_args_parser

import baseline
import distributed
from conftest import ROOT

# What distribution changes, and why.
DIFFER = {
    "fail": "which rank has failed; rank 0 speaks for all where they end alike",
    "build_parser": "--gradients and --report",
    "log": "only rank 0 speaks",
    "default_threads": "a worker's share of a container's quota",
    "set_up_device": "a GPU for each local rank",
    "evaluate": "each window on one rank, each question once",
    "save_checkpoint": "only rank 0 writes",
    "Board": "only rank 0 writes",
    "train_step": "the weight of a rank's share; one exchange in a step",
    "make_settings": "the number of ranks",
    "describe_environment": "all devices and hosts",
    "make_record": "the largest times of all ranks",
    "main": "joining and leaving the group, wrapping in DDP, agreeing on when to stop, the report",
}
ADDED = ["last_line", "join_ranks", "gather", "ExchangeTimer"]  # and the section on scaling
SECTIONS = ["options", "device", "data", "model", "evaluation", "checkpoints", "training"]


def definitions(script):
    source = (ROOT / script).read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}, source


def test_shared_functions_are_the_same_to_the_letter_and_in_order():
    (ours, _), (theirs, source) = definitions("baseline.py"), definitions("distributed.py")
    assert {name for name in ours if ours[name] != theirs.get(name)} == set(DIFFER)
    assert [name for name in theirs if name in ours] == list(ours)
    added, scaling = [name for name in theirs if name not in ours], source.index("\n# scaling -")
    assert [name for name in added if source.index(theirs[name]) < scaling] == ADDED


def statements(script, *kinds):
    """Return the statements of these kinds outside functions, in their order."""
    return [ast.unparse(node) for node in ast.parse((ROOT / script).read_text()).body if isinstance(node, kinds)]


@pytest.mark.parametrize(
    "kinds", [(ast.Assign, ast.AugAssign), (ast.Import, ast.ImportFrom)], ids=["values", "imports"]
)
def test_constants_and_imports_are_the_same_and_in_order(kinds):
    ours, theirs = statements("baseline.py", *kinds), statements("distributed.py", *kinds)
    assert [statement for statement in theirs if statement in ours] == ours


def test_errors_end_both_scripts_alike():
    """distributed.py only adds that a rank has lost its peers."""
    (ours,), (theirs,) = statements("baseline.py", ast.If), statements("distributed.py", ast.If)
    ours, theirs = ours.splitlines(), theirs.splitlines()
    added = [line for line in theirs if line not in ours]
    assert [line for line in theirs if line in ours] == ours
    assert len(added) == 3 and "lost the connection" in added[0] and "dist.DistError" in added[1]


@pytest.mark.parametrize(("script", "added"), [("baseline.py", []), ("distributed.py", ["scaling"])])
def test_sections_are_in_order(script, added):
    lines = (ROOT / script).read_text().splitlines()
    sections = [line.split()[1] for line in lines if line.startswith("# ") and "-----" in line]
    assert sections == [*SECTIONS, *added, "main"]


def long_options(parser):
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


@pytest.mark.parametrize("script", [baseline, distributed], ids=["baseline", "distributed"])
def test_torchrun_takes_no_option_for_its_own(script):
    """argparse takes the beginning of an option for the option, and refuses the beginning of two."""
    torchrun = long_options(get_args_parser())
    for option in long_options(script.build_parser()):
        meant = [theirs for theirs in torchrun if theirs.startswith(option)]
        assert option in torchrun or len(meant) < 2, f"{option} could mean torchrun's {meant}"


def test_torchrun_passes_every_option_on():
    arguments = ["--run-name", "x"]
    for action in distributed.build_parser()._actions:
        if "--help" not in action.option_strings and action.dest != "run_name":
            value = [] if action.nargs == 0 else [(action.choices or ["1"])[0]]
            arguments += [action.option_strings[0], *value]
    parsed = get_args_parser().parse_args(["--standalone", "--nproc-per-node=2", "distributed.py", *arguments])
    assert (parsed.training_script, parsed.training_script_args) == ("distributed.py", arguments)

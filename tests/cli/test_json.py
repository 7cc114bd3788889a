"""What leaves the package as JSON is JSON: no NaN, no Infinity."""

import ast
import json
from pathlib import Path

import pytest
from bench import all_reduce as bench_all_reduce
from bench import command as bench
from bench import qk_rms_norm as bench_qk_norm

from fd_fusion.cli.doctor import command as doctor
from fd_fusion.cli.doctor.checks import CheckResult
from fd_fusion.cli.messages import to_json
from fd_fusion.cli.tune import command as tune

PACKAGE = Path(__file__).parents[2] / "fd_fusion"
# Read back by Python alone, in the same job: there "the error is infinite" must arrive as that.
BETWEEN_OURS = {
    "binding/opening.py",
    "cli/doctor/child.py",
    "cli/processes/ranks.py",
    "comm/vote.py",
    "comm/sentinel.py",
}


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_no_number_is_null():
    data = {"a": [1.5, float("nan"), (float("inf"), -float("inf"), True)], "b": {"c": "NaN", "d": None}}
    assert strict(to_json(data)) == {"a": [1.5, None, [None, None, True]], "b": {"c": "NaN", "d": None}}


def test_every_other_dumps_refuses_what_is_no_number():
    loose = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("dump", "dumps")
        if not any(word.arg == "allow_nan" for word in node.keywords)
    }
    assert loose <= BETWEEN_OURS


def test_doctor(monkeypatch, capsys):
    found = [CheckResult("launch", "triton", "broken", "wrong numbers", data={"error_over_budget": float("inf")})]
    monkeypatch.setattr(doctor, "find", lambda *args, **how: found)
    assert doctor.main(["--json"]) == 2
    assert strict(capsys.readouterr().out)["checks"][0]["data"] == {"error_over_budget": None}


def test_tune(monkeypatch, capsys):
    monkeypatch.setattr(tune, "tune", lambda args, show: {"times": {"one_shot": {1: float("nan")}}})
    tune.main(["--hidden-size", "256", "--json"])
    assert strict(capsys.readouterr().out)["times"] == {"one_shot": {"1": None}}


@pytest.mark.parametrize("name", ["all-reduce", "qk-norm"])
def test_bench_renders_json_alone(name, capsys, tmp_path):
    (file := tmp_path / "x.json").write_text("{")
    assert bench.main([name, "--render", str(file)]) == 2
    assert "this is no JSON" in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize("module, made", [(bench_all_reduce, "_by_children"), (bench_qk_norm, "measure")])
def test_bench(module, made, monkeypatch, tmp_path):
    result = {"device": "x", "copy_gbps": float("nan"), "cells": [{"errors": [float("inf")], "us": 1.0}]}
    monkeypatch.setattr(module, made, lambda args: result)
    monkeypatch.setattr(module, "tables", lambda result: "")
    args = module.argparse.Namespace(child=None, render=None, output=tmp_path / "out.json", plot=None)
    module.run(args)
    assert strict((tmp_path / "out.json").read_text()) == {
        "device": "x",
        "copy_gbps": None,
        "cells": [{"errors": [None], "us": 1.0}],
    }

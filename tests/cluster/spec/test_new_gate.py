"""Adding a gate is adding one file: the spec, both evaluations and the explanation know it from that alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.contracts.gates import ARTICLE_GATES
from tests.house import ROOT

NEW_GATE = """
from serving.gates.registry import gate

def compare_suites(report, plan):
    return "pass", "as short offline", {"tasks": 40}

@gate("replies_not_longer", offline=compare_suites)
def compare_replies(evidence, plan):
    return "fail", f"longer at {evidence.share:g}", {"ratio": 1.4}
"""

PROBE = """
import json
from cluster.spec import knob_named, load_spec, override
from rl_actors.contracts import BadInputError
from serving.gates import check_gate_names, evaluate_offline
from serving.release.monitors import evaluate_live
from tests.serving.fakes import good_evidence, make_plan, make_report

found = {"limits": knob_named("release.gates").limits}
try:
    found["gates"] = override(load_spec("support_desk"), ["release.gates=" + GATES]).release.gates
except BadInputError as error:
    found["remedy"] = error.remedy
else:
    plan = make_plan(gates=found["gates"])
    check_gate_names(plan)
    looks = (*evaluate_offline(make_report(), plan), *evaluate_live(good_evidence(), plan))
    found["said"] = [(one.verdict, one.reason, one.evidence) for one in looks if one.gate == "replies_not_longer"]
print(json.dumps(found))
"""


def probed(folder: Path, *, is_added: bool) -> dict[str, Any]:
    """What a copy of the serving package finds, with the gate's file in it or without."""
    shutil.copytree(ROOT / "serving", folder / "serving", ignore=shutil.ignore_patterns("__pycache__"))
    if is_added:
        (folder / "serving" / "gates" / "reply_length.py").write_text(NEW_GATE)
    names = json.dumps([*ARTICLE_GATES, "replies_not_longer"])
    environ = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", f"GATES = {names!r}\n{PROBE}"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_new_gate_is_one_new_file(tmp_path: Path):
    found = probed(tmp_path, is_added=True)
    assert found["gates"] == [*ARTICLE_GATES, "replies_not_longer"]
    assert found["limits"] == f"any of {', '.join([*ARTICLE_GATES, 'replies_not_longer', 'task_success_not_worse'])}"
    assert found["said"] == [["pass", "as short offline", {"tasks": 40}], ["fail", "longer at 0.05", {"ratio": 1.4}]]


def test_without_the_file_the_name_is_refused(tmp_path: Path):
    """Negative control: it is the file that makes the difference."""
    found = probed(tmp_path, is_added=False)
    assert found.keys() == {"limits", "remedy"}
    assert "valid: no_safety_regression, " in found["remedy"]


@pytest.mark.parametrize("listed", [*ARTICLE_GATES, "task_success_not_worse"])
def test_today_s_gates_are_listed(listed: str):
    from cluster.spec.knobs import knob_named

    assert listed in knob_named("release.gates").limits.removeprefix("any of ").split(", ")

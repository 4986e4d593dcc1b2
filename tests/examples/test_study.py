"""The study: its report from complete runs, and the committed results against what the documentation says of them."""

import json
import shutil

import pytest
import study
import study_plan
import study_report
from places import ROOT


RESULTS = ROOT / "examples" / "results"
FEW = ["countdown", "chains_of_8", "few_shot_chains", "countdown_prompts", "countdown_lengths"]
BUDGETS = ("delta_tokens", "delta_time", "delta_prompts")


def write_run(run, path, final_score):
    """A complete run, as `compare_run` writes it."""
    metrics = {"entropy": 0.1, "frac_reward_zero_std": 0.4, "grad_norm": 1.0}
    if run.method.grows_trees:
        metrics |= {"tree/kept_groups/depth_1": 0.5, "tree/advantage_abs/depth_1": 1.2}
    seconds = 60 if run.method.name.startswith("forks") else 45
    lines = [{"run": {}}]
    for share in (0, 0.5, 1):
        num_right = round(100 * (0.2 + share * (final_score - 0.2)))
        scores = [1.0] * num_right + [0.0] * (100 - num_right)
        line = {"step": int(share * 80), "tokens": share * 160_000, "seconds": share * 50, "prompts": share * 720}
        line |= {"cpu_seconds": share * seconds, "pass_at_1": num_right / 100, "mean_length": 20.0}
        line |= {"mean_length_correct": 19.0, "truncated": 0.0, "metrics": metrics if share else {}}
        lines.append(line)
    lines[-1] |= {"final": True, "problem_scores": scores, "num_samples": 8, "pass_at_k": 0.9}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def score(run):
    """GRPO 0.6, flat samples 0.7, trees 0.8, forks 0.85; more at the higher rate, and with 8 completions."""
    kinds = {"grpo-4": 0.58, "grpo-8": 0.6, "flat": 0.7, "tree": 0.8, "forks": 0.85, "paper": 0.6}
    kind = next(value for name, value in kinds.items() if run.method.name.startswith(name))
    return kind + 0.05 * (run.learning_rate == 4e-4) + 0.01 * (run.seed % 2)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A study whose runs are all there; nothing is trained."""
    monkeypatch.setattr(study, "built_in", lambda name, models_dir, **options: name)
    for name in ("COMPARISONS", "CREDIT"):  # drawing all takes a minute
        monkeypatch.setattr(study, name, {task: found for task, found in getattr(study, name).items() if task in FEW})
    finished = study.Study(tmp_path, tmp_path / "results", num_workers=1, names=FEW)

    def execute(runs):
        for name, run in runs:
            write_run(run, tmp_path / name / f"{run.name}.jsonl", score(run))

    monkeypatch.setattr(finished, "execute", execute)
    for stage in ("credit", "prompts", "lengths"):
        study.STAGES[stage](finished)
    snr = [{"treerpo": name, "snr_ratio": 1.5, "snr_ratio_ci": [1.4, 1.6]} for name in ("forks-1x1", "flat-2")]
    (tmp_path / "countdown" / "snr.json").write_text(json.dumps(snr))
    return finished


def test_report_of_a_finished_study(finished, tmp_path):
    results = tmp_path / "results"
    study.write_report(finished)
    summary = json.loads((results / "summary.json").read_text())
    assert list(summary) == ["countdown", "chains_of_8", "few_shot_chains"]
    numbers = summary["countdown"]
    assert (numbers["method"], numbers["baseline"]) == ("forks-1x1", "grpo-8")
    assert (numbers["method_prompts"], numbers["flat_method_prompts"]) == ("tree-4x4", "flat-16")
    assert numbers["seeds"] == numbers["flat_seeds"] == 5
    assert (numbers["snr_ratio"], numbers["flat_snr_ratio"]) == (1.5, 1.5)
    assert numbers["delta_tokens"] == pytest.approx(25)
    assert numbers["flat_delta_tokens"] == pytest.approx(10)
    assert numbers["delta_prompts"] == pytest.approx(20, abs=0.5)
    for budget in BUDGETS:
        for prefix in ("", "flat_"):
            low, high = (numbers[f"{prefix}{budget}_{end}"] for end in ("low", "high"))
            assert low < numbers[prefix + budget] < high
    # Forks take 60 seconds where the others take 45: at GRPO's time they have three quarters of their steps, and trees
    # are what to take.
    reports = json.loads((results / "comparisons.json").read_text())["countdown"]["families"]
    forks = reports["forks"]["against_grpo"]
    assert forks["delta_at_equal_cpu_seconds"] < forks["delta_pass_at_1"] - 0.05
    assert (numbers["method_time"], numbers["flat_method_time"]) == ("tree-2x2", "flat-2")
    assert numbers["delta_time"] == pytest.approx(20)
    assert numbers["flat_delta_time"] == pytest.approx(numbers["flat_delta_tokens"])
    assert "delta_prompts" not in summary["few_shot_chains"]
    for name in FEW:
        assert (results / f"{name}.png").stat().st_size > 10_000
        runs = json.loads((results / f"{name}.json").read_text())
        assert len(runs["GRPO"]) == len(study_plan.COMPARISONS[name].seeds)
    headline = (results / "headline.md").read_text()
    assert "| countdown | 0.200 | 0.654 (grpo-8) | 0.904 (forks-1x1) | +25.0 (" in headline
    assert ", tree-2x2)" in headline
    table = (results / "overview.md").read_text()
    assert "| countdown | forks-1x1 | 5 | 0.904 | +25.0 (" in table
    assert (results / "overview.png").stat().st_size > 10_000


def test_report_has_what_is_complete(finished, tmp_path):
    for path in (tmp_path / "countdown").glob("forks-*-test-seed[0123]*"):
        path.unlink()
    for path in (tmp_path / "chains_of_8").glob("grpo-*-test-seed*"):
        path.unlink()
    for path in (tmp_path / "few_shot_chains").glob("*-test-seed2*"):
        path.unlink()
    study.write_report(finished)
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    reports = json.loads((tmp_path / "results" / "comparisons.json").read_text())
    assert "chains_of_8" not in summary
    assert list(reports["countdown"]["families"]) == ["GRPO", "tree", "flat", "paper"]
    assert summary["countdown"]["method"] == "tree-2x2"
    assert summary["few_shot_chains"]["seeds"] == 2


def test_report_keeps_what_it_has_no_runs_of(finished, tmp_path):
    study.write_report(finished)
    first = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    shutil.rmtree(tmp_path / "countdown")
    for path in (tmp_path / "chains_of_8").glob("*.jsonl"):
        path.unlink()
    snr = [{"treerpo": "tree-2x2", "snr_ratio": 1.3, "snr_ratio_ci": [1.2, 1.4]}]
    (tmp_path / "chains_of_8" / "snr.json").write_text(json.dumps(snr))
    study.write_report(finished)
    second = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"comparisons.json"}
    reports = json.loads(second["comparisons.json"])
    assert reports["chains_of_8"]["families"]["tree"]["snr_ratio"] == 1.3
    # What was chosen is known without the runs of the choice.
    assert finished.chosen("countdown", "forks")[0].name == "forks-1x1"


def test_the_overview_says_which_k_a_pass_at_k_has(finished, tmp_path):
    study.write_report(finished)
    reports = json.loads((tmp_path / "results" / "comparisons.json").read_text())
    assert "(pass@" not in study_report.overview_table(reports)
    for numbers in reports["countdown"]["families"].values():
        numbers["num_samples"] = 2.0
    rows = [line for line in study_report.overview_table(reports).splitlines() if "| 0.900" in line]
    assert {" 0.900 (pass@2) " in row for row in rows if "countdown |" in row} == {True}
    assert {" 0.900 |" in row for row in rows if "chains_of_8" in row} == {True}


def test_report_before_anything_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "built_in", lambda name, models_dir, **options: name)
    study.write_report(study.Study(tmp_path, tmp_path / "results", num_workers=1))
    assert json.loads((tmp_path / "results" / "summary.json").read_text()) == {}


def test_tuning_and_result_share_no_seed():
    for comparison in study_plan.COMPARISONS.values():
        assert not set(comparison.tuning_seeds) & set(comparison.seeds)
        assert len(comparison.learning_rates) == 1 or comparison.tuning_seeds
    for task in ("chain_arithmetic", "countdown", "chains_of_8", "noisy_graded_chains"):
        assert len(study_plan.CREDIT[task].seeds) >= 5


def test_names_of_methods_tell_them_apart():
    for comparison in study_plan.COMPARISONS.values():
        methods = [method for family in comparison.families.values() for method in family]
        assert len({method.name for method in methods}) == len(methods)
        assert all(method.shape(64).num_leaves >= 2 for method in methods)


def test_the_committed_results_are_what_the_study_writes():
    reports = json.loads((RESULTS / "comparisons.json").read_text())
    summary = json.loads((RESULTS / "summary.json").read_text())
    assert summary == {name: study_report.summarize(name, reports) for name in study_plan.CREDIT if name in reports}
    table = (RESULTS / "overview.md").read_text()
    assert table == study_report.overview_table(reports)
    for name in reports:
        assert (RESULTS / f"{name}.png").exists()


def test_the_documentation_states_the_committed_results():
    page, summary = (ROOT / "docs" / "results.md").read_text(), json.loads((RESULTS / "summary.json").read_text())
    headline = (RESULTS / "headline.md").read_text()
    assert headline == study_report.headline_table(summary)
    assert headline in page
    paper = RESULTS / "paper_credit"
    assert (paper / "headline.md").read_text() in (paper / "README.md").read_text()

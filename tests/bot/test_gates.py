"""A recipe's gates through the command line: where prompts come from, what is said of them, and the laws of the result."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bot.cli import main
from bot.gates import written_in
from bot.hub.server import Server, running
from bot.worth import is_measured
from merge.planner import build_plan
from merge.recipe import load_recipe
from merge.sources import Sources
from tests.bot.workflow import put_models
from tests.dense import save_dense

LONG = "once upon a time there was a small model "
PROMPTS = (
    ["tell me about the city", "what a nice day it is today", "how are you doing this evening"],
    ["def f(x): return x + 1", "for i in range(10): print(i)", "import os, sys; sys.exit(0)"],
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_dense(folder / f"m{n}", seed=n) for n in range(2)]


def written(folder: Path, models: list[Path], prompts: Any = PROMPTS, **keys: Any) -> Path:
    """A discriminant recipe over these models; `prompts` by expert, a list of texts or keys of the expert."""
    experts = [
        {"source_model": str(model), **(one if isinstance(one, dict) else {"positive_prompts": one})}
        for model, one in zip(models, prompts, strict=True)
    ]
    keys = {"gate_mode": "discriminant", "release": {"quants": []}} | keys
    path = folder / "recipe.yaml"
    # Through JSON, so that YAML has no reason to name a list twice.
    value = json.loads(json.dumps({"base_model": str(models[0]), "experts": experts} | keys))
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def gates(recipe: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What `moerge gates` prints and says."""
    assert main(["gates", str(recipe), "--device", "cpu"]) == code
    said = capsys.readouterr()
    return said.out + said.err


def address(text: str) -> str:
    found = re.search(r"content address (\w+)", text)
    assert found
    return found[1]


# ----------------------------------------------------------------------------------------------- where prompts come from


def test_a_file_of_prompts_by_role_or_number_equals_the_prompts_written_out(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = address(gates(written(tmp_path, models), capsys))
    (tmp_path / "all.json").write_text(json.dumps({"talk": PROMPTS[0], "2": PROMPTS[1]}))
    by_file = written(tmp_path, models, [{"role": "talk"}, {"role": "code"}], router={"prompts_file": "all.json"})
    assert address(gates(by_file, capsys)) == expected
    lines = [{"expert": role, "text": text} for role, texts in zip(("talk", 2), PROMPTS, strict=True) for text in texts]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    by_lines = written(tmp_path, models, [{"role": "talk"}, {"role": "code"}], router={"prompts_file": "all.jsonl"})
    assert address(gates(by_lines, capsys)) == expected


@pytest.mark.parametrize(
    ("content", "id_", "problem"),
    [
        ({"talk": ["a"], "verse": ["b"]}, "bad-prompts-file", "'verse' is not one expert's role or number"),
        ({"talk": []}, "bad-prompts-file", "not a list of texts"),
        ({"talk": ["only one"]}, "prompts-missing", "expert 2"),
        (["a"], "bad-prompts-file", "not a file of experts' prompts"),
    ],
)
def test_a_file_of_prompts_that_does_not_fit_the_experts_is_a_finding_at_its_line(
    content: Any, id_: str, problem: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "all.json").write_text(json.dumps(content))
    recipe = written(tmp_path, models, [{"role": "talk"}, {"role": "code"}], router={"prompts_file": "all.json"})
    said = gates(recipe, capsys, 1)
    assert id_ in said
    assert problem in said
    assert re.search(r"recipe\.yaml:\d+: error", said)


@pytest.fixture
def hub(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A Hub with the models and a dataset of texts in several formats, one of them large."""
    with running(tmp_path / "hub") as server:
        api = HfApi(endpoint=server.endpoint, token=server.token())
        put_models(server, models, "lab")
        api.create_repo("lab/texts", repo_type="dataset")
        talk, code = PROMPTS
        rows = "\n".join(json.dumps({"said": text, "id": number}) for number, text in enumerate(talk))
        large = "".join(json.dumps({"text": f"{code[n % 3]} # {n} {'x' * 500}"}) + "\n" for n in range(10_000))
        files = {
            "talk.jsonl": rows,
            "code.csv": "id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(code)),
            "data/large.jsonl": large,
            "list.json": json.dumps(code),
            "table.parquet": "PAR1",
        }
        for name, text in files.items():
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id="lab/texts", repo_type="dataset")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        server.log.clear()
        yield server


def slices(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"prompts": {"dataset": "lab/texts", **one}} for one in (first, second)]


def test_a_slice_of_a_dataset_equals_the_prompts_written_out(
    hub: Server, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = address(gates(written(tmp_path, models, [PROMPTS[0][:2], PROMPTS[1]]), capsys))
    talk = {"file": "talk.jsonl", "field": "said", "limit": 2}
    for code in ("code.csv", "list.json"):
        assert address(gates(written(tmp_path, models, slices(talk, {"file": code})), capsys)) == expected
    other = written(tmp_path, models, slices(talk | {"limit": 3}, {"file": "code.csv"}))
    assert address(gates(other, capsys)) != expected


def test_of_a_large_dataset_file_only_the_beginning_is_read_and_the_preview_counts_it(
    hub: Server, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(
        tmp_path, models, slices({"file": "data/large.jsonl", "limit": 4}, {"file": "talk.jsonl", "field": "said"})
    )
    assert main(["preview", "--json", str(recipe)]) == 0
    [preview] = json.loads(capsys.readouterr().out)
    sent = sum(exchange.sent for exchange in hub.log.all("GET", containing="/resolve/"))
    assert 65_000 < preview["download_bytes"] < 70_000  # the models are on this machine
    assert preview["download_bytes"] <= sent < 100_000


def test_a_dataset_is_pinned_to_its_revision(
    hub: Server, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.token())
    commit = api.dataset_info("lab/texts").sha
    code = {"file": "code.csv"}
    before = address(gates(written(tmp_path, models, slices({"file": "talk.jsonl", "field": "said"}, code)), capsys))
    api.upload_file(
        path_or_fileobj=b'{"said": "other text altogether"}\n{"said": "and more of it"}',
        path_in_repo="talk.jsonl",
        repo_id="lab/texts",
        repo_type="dataset",
    )
    pinned = {"dataset": f"lab/texts@{commit}", "file": "talk.jsonl", "field": "said"}
    assert address(gates(written(tmp_path, models, slices(pinned, code)), capsys)) == before
    moved = slices({"file": "talk.jsonl", "field": "said"}, code)
    assert address(gates(written(tmp_path, models, moved), capsys)) != before


@pytest.mark.parametrize(
    ("slice_", "code", "problem"),
    [
        ({"file": "talk.jsonl"}, 1, "no field 'text'"),
        ({"file": "nothing.jsonl"}, 4, "there is no such file in the dataset"),
        ({"file": "table.parquet"}, 1, "not one of .jsonl"),
        ({"dataset": "lab/absent", "file": "a.txt"}, 4, "no such dataset"),
        ({"dataset": "./here", "file": "a.txt"}, 1, "no dataset on the Hub"),
    ],
)
def test_a_slice_that_cannot_be_read_is_a_finding_at_its_line(
    slice_: dict[str, Any], code: int, problem: str, hub: Server, models: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = written(tmp_path, models, slices(slice_, {"file": "code.csv"}))
    assert main(["preview", str(recipe)]) == code
    said = capsys.readouterr()
    assert "bad-prompts-dataset" in said.out + said.err
    assert problem in said.out + said.err
    line = 1 + recipe.read_text().splitlines().index("  prompts:")
    assert f"recipe.yaml:{line}:" in said.out + said.err


# --------------------------------------------------------------------------------------------------- laws of the result


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_experts_equal_to_the_base_give_the_base_s_logits(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_dense(tmp_path / "base", model_type=model_type, dtype=torch.float32)
    recipe = written(tmp_path, [base, base])
    assert main(["merge", str(recipe), str(tmp_path / "out"), "--device", "cpu"]) == 0
    ids = torch.arange(3, 40)[None]
    dense, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (base, tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_same_recipe_gives_the_same_bytes(models: list[Path], tmp_path: Path) -> None:
    recipe = written(tmp_path, models, release={"quants": ["BF16"]})
    for out in ("one", "two"):
        assert main(["build", str(recipe), "--out", str(tmp_path / out), "--device", "cpu"]) == 0
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    same = [name for name in names if name.suffix in (".safetensors", ".gguf", ".png")]
    assert len(same) >= 4
    for name in same:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_report_compares_the_router_with_mergekit_s_and_with_chance(models: list[Path], tmp_path: Path) -> None:
    recipe = written(tmp_path, models)
    assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [router["router"] for router in report["routers"]] == ["discriminant", "hidden", "random"]
    for router in report["routers"]:
        assert [len(router[key]) for key in ("accuracy", "load", "entropy", "top_weight")] == [3] * 4
        assert [(group["first"], group["last"]) for group in router["groups"]] == [(0, 0), (1, 1), (2, 2)]
        for group in router["groups"]:
            assert [sum(row) for row in group["goes_to"]] == pytest.approx([1, 1])
        for layer, load in enumerate(router["load"]):
            matrix = router["groups"][layer]["goes_to"]
            assert load == pytest.approx([sum(column) / 2 for column in zip(*matrix, strict=True)])
    assert (tmp_path / "out/model/routing.png").read_bytes().startswith(b"\x89PNG")


def test_the_gates_command_prints_the_report_s_figures(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, models)
    assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    routers = json.loads((tmp_path / "out" / "report.json").read_text())["routers"]
    capsys.readouterr()
    assert main(["gates", str(recipe), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == routers
    assert main(["gates", str(recipe), "--device", "cpu"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    own = routers[0]
    header = next(n for n, line in enumerate(printed) if line[:5] == ["layer", "ridge", "right", "weight", "entropy"])
    for layer, line in enumerate(printed[header + 2 : header + 5]):
        right, weight, entropy = own["accuracy"][layer], own["top_weight"][layer], own["entropy"][layer]
        expected = [f"{100 * right:.1f}%", f"{weight:.2f}", f"{entropy:.2f}"]
        assert line == [str(layer), line[1], *expected, *(f"{100 * share:.1f}" for share in own["load"][layer])]
    for group in own["groups"]:
        title = next(n for n, line in enumerate(printed) if line[:1] == ["Confusion"] and f"{group['first']}:" in line)
        assert printed[title + 1] == ["1", "2"]
        for expert, row in enumerate(group["goes_to"]):
            assert printed[title + 2 + expert] == [str(expert + 1), *(f"{100 * share:.1f}" for share in row)]
    for peer in routers[1:]:
        [line] = [
            " ".join(line)
            for line in printed
            if line[:6] == ["On", "the", "same", "tokens", "gate_mode", f"{peer['router']}:"]
        ]
        assert f"{100 * sum(peer['accuracy']) / 3:.1f} % right" in line
        assert f"entropy {sum(peer['entropy']) / 3:.2f}." in line


def test_figures_as_json_are_an_empty_list_where_nothing_is_held_out(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gates", str(written(tmp_path, models, gate_mode="random")), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_card_tells_what_held_out_text_showed_and_judges_no_discriminant_by_its_vectors(
    models: list[Path], tmp_path: Path
) -> None:
    digits = ["0123456789 9876543210 0246813579", "5555 4444 3333 2222 1111 0000 9999", "8765 4321 8765 4321 0246"]
    letters = ["abc def ghi jkl mno pqr stu vwx", "zyx wvu tsr qpo nml kji hgf edc", "aeiou bcdfg hjklm npqrs tvwxz"]
    recipe = written(tmp_path, models, [digits, letters])
    assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    card = (tmp_path / "out/model/README.md").read_text()
    # The rows sum to zero, so by the condition no layer would tell the experts apart; by held-out text all do.
    assert all(layer["condition"] is None or layer["condition"] > 1e5 for layer in report["routing"])
    assert min(report["routers"][0]["accuracy"]) > 0.75
    assert "hard to tell apart" not in card
    assert "ondition number" not in card
    for router in report["routers"]:
        for layer, group in enumerate(router["groups"]):
            most = max(router["load"][layer])
            figures = (
                f"| `{router['router']}` | {layer} | {100 * router['accuracy'][layer]:.1f} % | {100 * most:.1f} % "
                f"(expert {router['load'][layer].index(most) + 1}) | {router['entropy'][layer]:.2f} | "
                f"{router['top_weight'][layer]:.2f} |"
            )
            assert figures in card
            matrix = card.split(f"<summary>{router['router']}: where")[1].split("</details>")[0]
            for expert, (first, second) in enumerate(group["goes_to"], 1):
                assert f"| {layer} | Expert {expert} | {100 * first:.1f} | {100 * second:.1f} |" in matrix


def test_of_vectors_that_mergekit_s_modes_make_a_shared_expert_s_gate_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stands below the router's rows, and equals one of them here."""
    base = save_dense(tmp_path / "base", model_type="qwen2")
    recipe = written(tmp_path, [base, base], gate_mode="hidden", architecture="qwen2_moe")
    value = yaml.safe_load(recipe.read_text())
    value["shared_experts"] = [{"source_model": str(base), "positive_prompts": PROMPTS[0], "residual_scale": 0.1}]
    recipe.write_text(yaml.safe_dump(value))
    said = gates(recipe, capsys)
    assert "1 and 2" in said
    assert "and 3" not in said


# ------------------------------------------------------------------------------------------------------- experts' worth


def test_the_worth_of_the_base_as_an_expert_is_the_base_s_own(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, models)
    assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    first, second = json.loads((tmp_path / "out" / "report.json").read_text())["worth"]
    assert first["shared"] == pytest.approx(first["base"], rel=1e-3)
    assert first["own"] == first["base"]
    assert second["own"] != second["shared"] != second["base"]
    assert "as it is" in gates(recipe, capsys)
    assert main(["gates", str(recipe), "--device", "cpu", "--no-worth"]) == 0
    assert "as it is" not in capsys.readouterr().out


def test_an_experts_worth_is_that_of_the_ordinary_models(models: list[Path], tmp_path: Path) -> None:
    recipe = written(tmp_path, models)
    assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    _, worth = json.loads((tmp_path / "out" / "report.json").read_text())["worth"]
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    base, expert = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16) for model in models)
    mixed = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16)
    for mine, other in zip(mixed.model.layers, expert.model.layers, strict=True):
        mine.mlp = other.mlp

    def loss(model: Any) -> float:
        total, count = 0.0, 0
        for prompt in PROMPTS[1]:
            ids = tokenizer(
                (tokenizer.bos_token or "") + prompt, add_special_tokens=False, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        return total / count

    found = [worth["base"], worth["own"], worth["shared"]]
    assert found == pytest.approx([loss(base), loss(expert), loss(mixed)], rel=2e-3)


def test_an_expert_that_is_worse_than_the_base_in_this_merge_is_named(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, models, [{"positive_prompts": PROMPTS[0]}, {"positive_prompts": PROMPTS[1]}])
    broken = yaml.safe_load(recipe.read_text())
    broken["experts"][1]["residual_scale"] = -10
    recipe.write_text(yaml.safe_dump(broken))
    assert "expert-loses-its-skill" in gates(recipe, capsys)


def test_worth_is_measured_of_large_models_on_a_gpu_alone_unless_asked(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bot.worth.SMALL", 1000)
    recipe = written(tmp_path, models)
    assert "as it is" not in gates(recipe, capsys)
    assert main(["gates", str(recipe), "--device", "cpu", "--worth"]) == 0
    assert "as it is" in capsys.readouterr().out
    loaded = load_recipe(recipe)
    opened, _ = Sources(tmp_path).open_all(loaded.recipe.references)
    plan = build_plan(loaded, opened)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert is_measured(loaded, plan, "auto")
    assert not is_measured(loaded, plan, "cpu")


def test_an_expert_with_an_adapter_is_measured_with_all_of_it(models: list[Path], tmp_path: Path) -> None:
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 64,
        "target_modules": ["q_proj", "up_proj"],
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(peft))
    torch.manual_seed(0)
    shapes = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (96, 64)}
    save_file(
        {
            f"base_model.model.model.layers.{layer}.{name}.lora_{side}.weight": torch.randn(
                (2, columns) if side == "A" else (rows, 2)
            )
            for layer in range(3)
            for name, (rows, columns) in shapes.items()
            for side in "AB"
        },
        adapter / "adapter_model.safetensors",
    )
    recipe = written(tmp_path, [models[0], Path(f"{models[0]}+{adapter}")])
    assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    _, worth = json.loads((tmp_path / "out" / "report.json").read_text())["worth"]
    # With its attention it is another model than with the base's.
    assert len({round(worth[key], 3) for key in ("base", "own", "shared")}) == 3


def test_experts_write_their_own_text_which_the_preview_counts(
    hub: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_models = [Path("lab/m0"), Path("lab/m1")]
    prompts = [{"positive_prompts": ["talk", "city"]}, {"positive_prompts": ["code", "python"]}]
    said = {}
    for expand in ("base", "experts"):
        recipe = written(tmp_path, hub_models, prompts, router={"expand": expand})
        assert main(["preview", "--json", str(recipe)]) == 0
        [said[expand]] = json.loads(capsys.readouterr().out)
    assert said["experts"]["download_bytes"] > said["base"]["download_bytes"]
    assert "experts-write-their-own" in [finding["id"] for finding in said["experts"]["findings"]]
    assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {one["expert"] for one in report["written_prompts"]} == {0, 1}
    assert {one["prompt"] for one in report["written_prompts"]} == {"talk", "city", "code", "python"}


def test_no_text_is_written_from_short_prompts_where_the_recipe_says_so(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, written_by_expand = tmp_path / "gates.safetensors", {}
    for expand in (True, False):
        recipe = written(tmp_path, models, [["talk", "city"], ["code", "python"]], router={"expand": expand})
        assert main(["gates", str(recipe), "--device", "cpu", "--no-worth", "--out", str(out)]) == 0
        assert ("texts were written from short prompts" in capsys.readouterr().out) is expand
        written_by_expand[expand] = written_in(out)
    assert {one["prompt"] for one in written_by_expand[True]} == {"talk", "city", "code", "python"}
    assert written_by_expand[False] == ()


# -------------------------------------------------------------------------------------------------- what a preview says


@pytest.mark.parametrize(
    ("keys", "finding"),
    [
        ({"gate_mode": None}, "discriminant-hint"),
        ({"gate_mode": "hidden"}, "discriminant-hint"),
        ({"gate_mode": "hidden", "router": {"expand": False}}, "only-for-discriminant"),
        ({"gate_mode": "random"}, "unused-prompts"),
        ({}, None),
    ],
)
def test_a_preview_says_what_the_gate_mode_makes_of_the_prompts(
    keys: dict[str, Any], finding: str | None, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, models, **keys)
    value = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({key: x for key, x in value.items() if x is not None}))
    assert main(["preview", "--json", str(recipe)]) == 0
    [said] = json.loads(capsys.readouterr().out)
    known = {"discriminant-hint", "only-for-discriminant", "unused-prompts"}
    found = known & {one["id"] for one in said["findings"]}
    assert finding in found if finding else not found


# ----------------------------------------------------------------------------------------------------- degenerate cases


def test_text_from_short_prompts_is_written_once_and_again_where_it_is_damaged(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], written_cache: Path
) -> None:
    before = set(written_cache.iterdir())
    recipe = written(tmp_path, models, [["verse"], PROMPTS[1]])
    figures = []
    for expected in (True, False, True):
        assert main(["gates", str(recipe), "--device", "cpu"]) == 0
        said = capsys.readouterr()
        assert ("text from short prompts" in said.err) == expected
        figures.append(said.out)
        [kept] = set(written_cache.iterdir()) - before
        if len(figures) == 2:
            kept.write_text('[{"expert": 0}]')
    assert figures[0] == figures[1] == figures[2]


def test_one_expert_gets_all_tokens(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path, models[:1], [PROMPTS[0]], experts_per_token=1)
    said = gates(recipe, capsys)
    assert "There is one expert, so every token goes to it." in said
    assert "all-experts-per-token" in said
    assert main(["preview", str(recipe)]) == 0
    assert "1 expert, 1 per token" in capsys.readouterr().out


def test_identical_experts_are_named(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "all-experts-same" in gates(written(tmp_path, [models[0], models[0]]), capsys)


def test_identical_prompts_are_refused(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "identical-prompts" in gates(written(tmp_path, models, [["the same"], ["the same"]]), capsys, 1)


def test_prompts_of_one_token_are_named(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(tmp_path, models, [["a"], ["b"]], router={"expand": False})
    said = gates(recipe, capsys)
    assert "nothing-to-hold-out" in said
    assert "Confusion" not in said


def test_an_expert_without_prompts_is_named(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "prompts-missing" in gates(written(tmp_path, models, [PROMPTS[0], []]), capsys, 1)


def test_a_prompt_longer_than_the_context_is_named(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "prompts-cut" in gates(written(tmp_path, models, [[LONG * 40], PROMPTS[1]]), capsys)


def test_of_very_many_prompts_a_part_is_used_and_said(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge.gates.prompts.MAX_TOKENS", 100)
    many = [LONG + str(number) for number in range(40)]
    assert "prompts-thinned" in gates(written(tmp_path, models, [many, PROMPTS[1]]), capsys)


def test_a_base_without_bos_is_named(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(models[0], tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    assert "no-bos" in gates(written(tmp_path, [base, models[1]]), capsys)
    assert "no-bos" not in gates(written(tmp_path, models), capsys)


def test_the_padding_side_changes_nothing(models: list[Path], tmp_path: Path) -> None:
    made = []
    for side in ("left", "right"):
        base = shutil.copytree(models[0], tmp_path / side)
        settings = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": side}))
        recipe, out = written(tmp_path, [base, models[1]]), tmp_path / f"{side}.safetensors"
        assert main(["gates", str(recipe), "--device", "cpu", "--no-worth", "--out", str(out)]) == 0
        made.append(load_file(out))
    assert all(torch.equal(gate, made[1][name]) for name, gate in made[0].items())


def test_a_shared_experts_gate_is_fitted_to_its_prompts(tmp_path: Path) -> None:
    bases = [save_dense(tmp_path / f"q{n}", seed=n, model_type="qwen2") for n in range(3)]
    shared = {"source_model": str(bases[2]), "residual_scale": 0.1, "positive_prompts": ["1 + 1 = 2 and 2 + 2 = 4"]}
    recipe = written(tmp_path, bases[:2], shared_experts=[shared])
    assert main(["build", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.model_type == "qwen2_moe"
    for layer in model.model.layers:
        assert float(layer.mlp.shared_expert_gate.weight.detach().abs().max()) > 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one["expert"] for one in report["worth"]] == [0, 1]
    assert len(report["routers"][0]["load"][0]) == 2

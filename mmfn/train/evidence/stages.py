"""The stages of a card: each runs what a user would run and returns its figures by name."""

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from mmfn.errors import UserError
from mmfn.interop.checkpoint import read_config
from mmfn.interop.hf import load_hf, save_hf
from mmfn.train.build.kernels import build_ops
from mmfn.train.build.model import find_device
from mmfn.train.build.processor import eos_token_ids, load_model_processor
from mmfn.train.evidence import equality, library
from mmfn.train.evidence.bench import Bench, records, without_times
from mmfn.train.evidence.card import (
    ONE_DEVICE,
    EqualityStage,
    ExportStage,
    ImportStage,
    ResumeStage,
    Stage,
    TrainingStage,
)
from mmfn.train.evidence.files import last_state, newest, tensors_apart
from mmfn.train.evidence.processes import MMFN, start
from mmfn.train.forward import Forward
from mmfn.train.run.answer import text_of
from mmfn.train.run.evaluate import evaluate

Figures = dict[str, float]


def run(stage: Stage, bench: Bench) -> Figures:
    """The figures of a stage. Raises ValueError, one sentence, where it cannot be run at all."""
    by_kind: dict[type[Stage], Callable[[Any, Bench], Figures]] = {
        ImportStage: run_import,
        EqualityStage: run_equality,
        TrainingStage: run_training,
        ResumeStage: run_resume,
        ExportStage: run_export,
    }
    return by_kind[type(stage)](stage, bench)


def run_import(stage: ImportStage, bench: Bench) -> Figures:
    """Logits of the checkpoint that the config starts from, against transformers'."""
    loaded = bench.load("model.init=load")
    dataset = bench.dataset(loaded)
    samples = [dataset.sample(i) for i in range(min(stage.samples, len(dataset)))]
    found = _compare(loaded.config.model.path, samples, stage.dtype, bench)
    return {"logits": found.largest, "tokens_apart": found.tokens_apart, "tokens": found.tokens}


def run_equality(stage: EqualityStage, bench: Bench) -> Figures:
    """Steps on a mesh of threads or processes, against one device."""
    narrow = "float32" if stage.dtype == "float64" else stage.dtype
    plain, spread = (bench.load(f"model.dtype={narrow}", *more) for more in (ONE_DEVICE, stage.settings))
    steps = equality.Steps(number=stage.steps, dtype=getattr(torch, stage.dtype))
    if stage.ranks == "virtual":
        return equality.compare(spread, plain, bench.dataset(plain), steps)
    if bench.ranks.size > 1:
        return equality.compare_on_ranks(spread, plain, bench.dataset(plain), steps, bench.ranks)
    return _on_processes(stage, bench, spread.config.layout.sizes.world)


def run_training(stage: TrainingStage, bench: Bench) -> Figures:
    """`mmfn train`, as far as its records and its evaluation tell."""
    bench.train(bench.run, "output.overwrite=true")
    steps = records(bench.run)
    last = steps[-max(1, len(steps) // 10) :]
    figures = {
        "first_loss": steps[0]["loss"],
        "loss": statistics.fmean(record["loss"] for record in last),
        "skipped": sum(record["skipped"] for record in steps),
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in steps),
    }
    path = bench.run / "eval.json"
    return figures | ({"accuracy": json.loads(path.read_text(encoding="utf-8"))["accuracy"]} if path.exists() else {})


def run_resume(stage: ResumeStage, bench: Bench) -> Figures:
    """A run that is killed and goes on, against one that is not."""
    settings = (f"train.steps={stage.steps}", f"checkpoint.every={stage.save_every}")
    whole, killed = bench.root / "uninterrupted", bench.root / "killed"
    afresh = (*settings, "checkpoint.resume=none", "output.overwrite=true")
    bench.train(whole, *afresh)
    bench.train(killed, *afresh, until=stage.kill_at)
    resumed_at = newest(killed)
    bench.train(killed, *settings, "checkpoint.resume=auto")
    want, found = (list(map(without_times, records(folder))) for folder in (whole, killed))
    return {
        "weights_apart": tensors_apart(whole / "checkpoint", killed / "checkpoint"),
        "state_apart": tensors_apart(last_state(whole), last_state(killed)),
        "steps_apart": sum(a != b for a, b in zip(want, found, strict=False)) + abs(len(want) - len(found)),
        "resumed_at": resumed_at,
    }


def run_export(stage: ExportStage, bench: Bench) -> Figures:
    """The checkpoint of stage training, read back. Raises ValueError where there is none."""
    path = bench.run / "checkpoint"
    if not (bench.run / "eval.json").exists() or not path.exists():
        raise UserError(f"{bench.path}: stage export reads the run of stage training; run that too, with data.eval set")
    loaded = bench.load(f"model.path={path}", "model.init=load")
    section, config = loaded.config.model, loaded.config
    processor = load_model_processor(section.path, config.data.chat, config.data.media_settings)
    held_out = bench.dataset(loaded, is_held_out=True)
    model = load_hf(path, dtype=getattr(torch, section.dtype), device=(device := find_device(section.device)))
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "again", model, assets=path, layout=config.output.experts)
        apart = tensors_apart(path, Path(folder) / "again")
    eos = eos_token_ids(path, processor, model.cfg.vocab_size)
    longest = config.eval.max_new_tokens
    again = evaluate(
        Forward.of(model, build_ops(section)),
        held_out,
        batch_samples=config.eval.batch_samples,
        max_new_tokens=longest,
        eos_token_ids=eos,
    )
    before = json.loads((bench.run / "eval.json").read_text(encoding="utf-8"))
    predictions = [one["prediction"] for one in before["answers"]]
    indices = range(min(stage.samples, len(held_out)))
    compared = _compare(str(path), [held_out.sample(i) for i in indices], stage.dtype, bench)
    prompts = [held_out.prompt(i)[0] for i in indices]
    theirs = library.answer(path, prompts, getattr(torch, section.dtype), device, longest)
    texts = [text_of(tokens, processor.chat.tokenizer, eos) for tokens in theirs]
    return {
        "tensors_apart": apart,
        "answers_apart": sum(one.prediction != text for one, text in zip(again.answers, predictions, strict=True)),
        "loss_apart": abs(again.loss - before["loss"]),
        "keys": compared.keys,
        "logits": compared.largest,
        "library_answers_apart": sum(mine != other for mine, other in zip(predictions, texts, strict=False)),
    }


def _compare(path: str, samples: list[Any], dtype: str, bench: Bench) -> library.Comparison:
    section = bench.load().config.model
    read_config(Path(path))  # a folder that is none is named before transformers looks for it elsewhere
    return library.compare(path, samples, getattr(torch, dtype), find_device(section.device), build_ops(section))


def _on_processes(stage: EqualityStage, bench: Bench, world: int) -> Figures:
    """The figures that as many processes as the layout has ranks find, each an `mmfn verify` of this card."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "card.md"
        command = [*MMFN, "verify", bench.path, *bench.overrides, "--only", "equality", "--out", str(out)]
        with start(command, "mmfn verify on several ranks", world) as ranks:
            try:
                ranks.wait()
            except UserError:
                if not out.exists():  # else they say no more than that a figure is not what is expected
                    raise
        findings = yaml.safe_load(out.with_suffix(".yaml").read_text(encoding="utf-8"))
    figures: Figures = {line["figure"]: line["measured"] for line in findings["lines"] if line["layout"] == stage.name}
    return figures

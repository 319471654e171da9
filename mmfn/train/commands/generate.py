"""`mmfn generate`: a checkpoint's answers, to one prompt or to a file of them."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmfn.batch import Sample
from mmfn.errors import UserError
from mmfn.parallel.mesh import launch
from mmfn.parallel.mesh.host_values import gather_values
from mmfn.train.build.data import open_dataset
from mmfn.train.build.forward import build_forward
from mmfn.train.build.kernels import build_ops
from mmfn.train.build.match import check_match
from mmfn.train.build.model import find_device
from mmfn.train.build.processor import eos_token_ids, load_model_processor, published_sampling
from mmfn.train.build.shards import load_shards
from mmfn.train.config.inference import checkpoint_config, for_inference
from mmfn.train.config.schema import Config
from mmfn.train.data import Dataset, Processor, prefetch
from mmfn.train.data.media import MediaReader
from mmfn.train.forward import Forward
from mmfn.train.run.answer import AnswerSettings, answer_prompts, encode_prompt, ignore_text
from mmfn.train.run.held_out import AHEAD, shares
from mmfn.train.run.watchdog import watched
from mmfn.train.sampling import Sampling

DRAWN = ("top_k", "top_p", "seed")  # what counts where answers are drawn alone
Say = Callable[..., None]


def run(args: argparse.Namespace, say: Say) -> None:
    """`mmfn generate`: answer one prompt, or every conversation of a file, one JSON line for each."""
    config = _config(args)
    build_ops(config.model)  # refused before a weight is read
    processor = load_model_processor(config.model.path, config.data.chat, config.data.media_settings)
    sampling = _sampling(args)
    prompts = _prompts(args, config, processor)
    device = find_device(config.model.device, args.ranks)
    timeout_s = config.layout.timeout_s
    with (
        watched(args.ranks, None, timeout_s) as watch,
        launch.placed(args.ranks, config.layout.sizes, device, timeout_s) as place,
    ):
        watch.loss = "what is not printed is lost"
        model = load_shards(config, place)
        check_match(model, processor)
        settings = AnswerSettings(
            max_new_tokens=args.max_new_tokens,
            eos_token_ids=eos_token_ids(Path(args.checkpoint), processor, model.cfg.vocab_size),
            sampling=sampling,
            stops=tuple(args.stop),
        )
        forward = build_forward(config, model, place)
        watch.enter("generation")
        if isinstance(prompts, Dataset):
            for line in _lines(forward, prompts, settings, config.eval.batch_samples):
                say(json.dumps(line, ensure_ascii=False))
        else:
            _answer(forward, processor, prompts, settings, say, is_streamed=args.stream)


def _answer(
    forward: Forward, processor: Processor, prompt: Sample, settings: AnswerSettings, say: Say, *, is_streamed: bool
) -> None:
    """One answer, by the first rank, as a whole or as it comes."""
    is_first = forward.axis.index == 0

    def stream(row: int, text: str) -> None:
        say(text, end="")

    on_text = stream if is_streamed else ignore_text
    texts = answer_prompts(forward, processor.chat.tokenizer, [prompt] if is_first else [], settings, on_text=on_text)
    if is_first:
        say("" if is_streamed else texts[0].strip())


def _lines(forward: Forward, data: Dataset, settings: AnswerSettings, batch_samples: int) -> Iterator[dict[str, Any]]:
    """`{"id", "answer"}` of every conversation, in order; ranks divide them and tell each other batch by batch."""

    def read(indices: Sequence[int]) -> tuple[Sequence[int], list[Sample]]:
        return indices, [data.question(i) for i in indices]

    for indices, prompts in prefetch(read, shares(len(data), batch_samples, forward.axis), AHEAD):
        texts = answer_prompts(forward, data.processor.chat.tokenizer, prompts, settings, rows=list(indices))
        own = [{"id": data.records[i].id, "answer": text.strip()} for i, text in zip(indices, texts, strict=True)]
        of_ranks = gather_values(own, forward.axis, "answers")
        for place in range(len(of_ranks[0])):  # rank 0 has as many as any
            yield from (lines[place] for lines in of_ranks if place < len(lines))


def _config(args: argparse.Namespace) -> Config:
    thinking = None if args.thinking is None else args.thinking == "on"
    model = {
        "path": args.checkpoint,
        "dtype": args.dtype,
        "device": args.device,
        "adapter": args.adapter,
        "kernels": args.kernels,
    }
    config = checkpoint_config(model, {"template": args.template, "enable_thinking": thinking}, args.set)
    return for_inference(config, args.ranks.size)


def _prompts(args: argparse.Namespace, config: Config, processor: Processor) -> Sample | Dataset:
    """The one prompt, or the data set of `--prompts`. Raises ValueError for both, for neither and for what is of no
    use."""
    media = {"--image": args.image, "--video": args.video, "--audio": args.audio}
    if (args.prompts is None) == (args.prompt is None):
        raise UserError("mmfn generate needs a PROMPT or --prompts FILE, one of the two")
    if args.prompts is not None:
        idle = [name for name, paths in media.items() if paths] + (["--stream"] if args.stream else [])
        if idle:
            raise UserError(f"{idle[0]} has no effect beside --prompts, whose entries name their media; remove it")
        return open_dataset(config.data, args.prompts, processor)
    reader = MediaReader(
        processor.media,
        limits=config.data.limits,
        audio_rate=config.data.audio_sampling_rate,
        is_heard=config.data.use_audio_in_video,
    )
    return encode_prompt(processor, args.prompt, images=args.image, videos=args.video, audios=args.audio, reader=reader)


def _sampling(args: argparse.Namespace) -> Sampling:
    """Greedy, or as the checkpoint says; what the command line says wins. Raises ValueError for what has no effect."""
    names = ("temperature", "repetition_penalty", *DRAWN)
    told = {name: value for name in names if (value := getattr(args, name)) is not None}
    base = published_sampling(Path(args.checkpoint)) if args.sampling == "checkpoint" else {}
    sampling = Sampling(**{**base, **told})
    if sampling.is_greedy and (idle := [name for name in DRAWN if name in told]):
        flag = idle[0].replace("_", "-")
        raise UserError(f"--{flag} has no effect on greedy answers; give --temperature, or remove it")
    return sampling

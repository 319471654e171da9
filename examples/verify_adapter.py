"""Does peft read the adapter that mmfn wrote, and give the same answers?

    python examples/verify_adapter.py build/demo

Loads the demo's checkpoint with transformers and the adapter of the LoRA run (`configs/lora.yaml`) with peft, answers
every held-out question by greedy `generate`, no mmfn code in between, and compares with the run's eval.json. Exits 1 on
any answer that differs.
"""

import json
import sys
import warnings
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration
from transformers.utils import logging
from verify_export import BATCH_SAMPLES, answers

NEW_TOKENS = 6  # as in the config


def main(folder: Path) -> int:
    """Compare the run in `folder`/lora with peft; returns the exit code."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's call
    base, run = folder / "run" / "checkpoint", folder / "lora"
    model = PeftModel.from_pretrained(Qwen3VLForConditionalGeneration.from_pretrained(base), run / "adapter")
    adapted = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name)
    total = sum(p.numel() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    processor = Qwen2VLImageProcessorPil.from_pretrained(base)
    entries = json.loads((folder / "eval_parity.json").read_text(encoding="utf-8"))
    evaluation = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    theirs: list[str] = []
    for first in range(0, len(entries), BATCH_SAMPLES):
        theirs += answers(entries[first : first + BATCH_SAMPLES], folder, model, tokenizer, processor, NEW_TOKENS)
    pairs = list(zip(evaluation["answers"], theirs, strict=True))
    different = [(mine["id"], mine["prediction"], other) for mine, other in pairs if mine["prediction"] != other]
    for identity, mine, other in different:
        print(f"verify: sample {identity}: mmfn answered {mine!r}, peft {other!r}")
    same = len(pairs) - len(different)
    print(f"peft loads the adapter, {adapted:,} of {total:,} parameters ({adapted / total:.1%})")
    print(f"{same} of {len(pairs)} of its greedy answers are the same as mmfn's")
    print(f"held-out accuracy: {evaluation['accuracy']:.4f}")
    return 1 if different else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/verify_adapter.py DEMO_FOLDER")
    sys.exit(main(Path(sys.argv[1])))

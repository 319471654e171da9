"""Renders the cases of templates.json beside this file with published chat templates, and writes the texts there.

    python tests/goldens/make_template_goldens.py NAME=TEMPLATE.jinja ...

NAME is that of a template which mmfn brings (mmfn/models/data/templates). Where the goldens are from: Qwen2.5-VL and
Qwen3-VL, checkpoints of Hugging Face; Qwen3.5, the wheel of trl 1.16.0 (qwen3_5_think, qwen3_5_nothink); Qwen3-Omni and
GLM-4.5V, the model files of xorbitsai/inference, the latter with the blank lines of its tool header put back. Rendered
with transformers 5.23.0; "!! " begins the error that a template raises.
"""

import json
import sys
from pathlib import Path

FILE = Path(__file__).parent / "templates.json"


def main(templates: dict[str, Path]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    goldens = json.loads(FILE.read_text(encoding="utf-8"))
    for name, path in templates.items():
        source, texts = path.read_text(encoding="utf-8"), {}
        for case, chat in goldens["cases"].items():
            try:
                rendered, _ = render_jinja_template([chat["messages"]], chat_template=source, **chat["kwargs"])
                texts[case] = rendered[0]
            except Exception as error:
                texts[case] = f"!! {type(error).__name__}: {error}"
        goldens["rendered"][name] = texts
    FILE.write_text(json.dumps(goldens, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main({name: Path(path) for name, path in (argument.split("=", 1) for argument in sys.argv[1:])})

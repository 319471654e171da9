import json
import shutil

import pytest

from mmfn.train.data import load_processor


def test_sections_of_newer_libraries(tmp_path, digits, processor):
    shutil.copytree(digits / "model", tmp_path / "model")
    both = {}
    for name, file in (("image_processor", "preprocessor_config"), ("video_processor", "video_preprocessor_config")):
        path = tmp_path / "model" / f"{file}.json"
        both[name] = json.loads(path.read_text())
        path.unlink()
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps({"processor_class": "X", **both}))
    loaded = load_processor(tmp_path / "model")
    assert loaded.media == processor.media


def test_template_is_overridden(digits):
    template = "{% generation %}x{% endgeneration %}"
    assert load_processor(digits / "model", template=template).chat.template == template


def test_video_is_optional(tmp_path, digits):
    shutil.copytree(digits / "model", tmp_path / "model")
    (tmp_path / "model" / "video_preprocessor_config.json").unlink()
    assert load_processor(tmp_path / "model").media.video_spec is None
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json; copy it"):
        load_processor(tmp_path / "model")


def test_a_section_that_is_no_object(tmp_path, digits):
    shutil.copytree(digits / "model", tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").write_text('{"image_processor": "x"}')
    with pytest.raises(ValueError, match=r"'image_processor' in '.*processor_config\.json' must be an object, got 'x'"):
        load_processor(tmp_path / "model")

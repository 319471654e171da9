"""What users write: inputs of the kinds that bug reports of fine-tuning projects are full of, and what is right.

Rows are (entry, expected). Texts are those of Qwen3-VL, in which a run of media tokens is written once.
"""

import json
from typing import Any

START, END = "<|im_start|>", "<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
GROUP = "<|vision_start|><|video_pad|><|vision_end|>"
MARKERS = ("<image>", "<video>", "<audio>")
CALL = {"name": "f", "arguments": {"a": 1}}
WRITTEN_CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
HTML = "<video><source src='x.mp4'></video> and <image> and <audio>"


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def turn(speaker: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value, **more}


def talk(content: Any = "hi", answer: Any = "yo", **more: Any) -> dict[str, Any]:
    return {"messages": [said("user", content), said("assistant", answer)], **more}


def shown(part: Any, **more: Any) -> dict[str, Any]:
    """A question with one part and no text."""
    return talk([part], **more)


def written(**turns: str) -> str:
    return "".join(f"{START}{role.rstrip('_')}\n{text}{END}" for role, text in turns.items())


ROOT = "ROOT"  # in entries: the folder that the data lie in
ASKED = written(user=f"{IMAGE}?", assistant="yo")
ONE = {"images": ["a.png"]}

READ: dict[str, tuple[dict[str, Any], str]] = {  # name -> (entry, its text)
    # keys of other formats
    "system beside the turns": (
        {"conversations": [turn("human", "hi"), turn("gpt", "yo")], "system": "Arr."},
        written(system="Arr.", user="hi", assistant="yo"),
    ),
    "empty system beside the turns": (
        {"conversations": [turn("human", "hi"), turn("gpt", "yo")], "system": ""},
        written(user="hi", assistant="yo"),
    ),
    "system of alpaca with its history": (
        {"instruction": "q", "input": "", "output": "a", "history": [["x", "y"]], "system": "Arr."},
        written(system="Arr.", user="x", assistant="y", user_="q", assistant_="a"),
    ),
    "developer": (
        {"messages": [said("developer", "Arr."), *talk()["messages"]]},
        written(system="Arr.", user="hi", assistant="yo"),
    ),
    "nulls of tables": (talk(images=None, videos=None, tools=None), written(user="hi", assistant="yo")),
    "empty lists": (talk(images=[], audios=[], tools=[]), written(user="hi", assistant="yo")),
    "nulls in messages": (
        {"messages": [said("user", "hi"), said("assistant", "yo", tool_calls=None, reasoning_content=None)]},
        written(user="hi", assistant="yo"),
    ),
    "nulls of keys that neighbours have": (
        {
            "id": None,
            "conversations": None,
            "system": None,
            "messages": [
                said(
                    "user", [{"type": "image", "image": "a.png", "text": None, "fps": None}], tool_calls=None, name=None
                ),
                said(
                    "assistant", [{"type": "text", "text": "yo", "image": None, "image_url": None}], tool_call_id=None
                ),
            ],
        },
        written(user=IMAGE, assistant="yo"),
    ),
    "nulls of a chat API": (
        talk(
            [
                {"type": "image_url", "text": None, "image_url": {"url": "a.png"}},
                {"type": "text", "text": "?", "image_url": None},
            ]
        ),
        ASKED,
    ),
    "a file as tables write it": (talk("<image>?", images=[{"bytes": None, "path": "a.png"}]), ASKED),
    "calls as an empty string": (
        {"messages": [said("user", "hi"), said("assistant", "yo", tool_calls="")]},
        written(user="hi", assistant="yo"),
    ),
    "one path for a list": (talk("<image>?", images="a.png"), ASKED),
    "the key of one image": (talk("<image>?", image="a.png"), ASKED),
    "a path in its part": (talk([{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]), ASKED),
    "a part of a chat API": (
        talk([{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}]),
        ASKED,
    ),
    "a part whose url is a string": (
        talk([{"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": "?"}]),
        ASKED,
    ),
    "a path inside the root, in full": (talk("<image>?", images=[f"{ROOT}/a.png"]), ASKED),
    "a path with a dot": (talk("<image>?", images=["./a.png"]), ASKED),
    "a path with spaces and umlauts": (talk("<image>?", images=["ä b.png"]), ASKED),
    "an entry of a list with settings": (talk("<image>?", images=[{"image": "a.png", "max_pixels": 64}]), ASKED),
    # calls
    "calls as a JSON string": (
        {"messages": [said("user", "hi"), said("assistant", "", tool_calls=json.dumps([CALL]))]},
        written(user="hi", assistant=WRITTEN_CALL),
    ),
    "arguments as a JSON string": (
        {
            "messages": [
                said("user", "hi"),
                said(
                    "assistant", None, tool_calls=[{"type": "function", "function": {**CALL, "arguments": '{"a": 1}'}}]
                ),
            ]
        },
        written(user="hi", assistant=WRITTEN_CALL),
    ),
    "calls of ShareGPT": (
        {"conversations": [turn("human", "hi"), turn("function_call", json.dumps(CALL)), turn("observation", "7")]},
        written(user="hi", assistant=WRITTEN_CALL, user_="\n<tool_response>\n7\n</tool_response>"[1:]),
    ),
    "calls in a list of multimodal_tool": (
        {"messages": [said("user", "hi"), said("tool_call", json.dumps([CALL])), said("tool_response", "7")]},
        written(user="hi", assistant=WRITTEN_CALL, user_="\n<tool_response>\n7\n</tool_response>"[1:]),
    ),
    "markers in arguments": (
        {"messages": [said("user", "hi"), said("assistant", "", tool_calls=[{**CALL, "arguments": {"x": HTML}}])]},
        written(user="hi", assistant=WRITTEN_CALL.replace('"a": 1', f'"x": "{HTML}"')),
    ),
    # videos that come as frames
    "frames at the rate of the setting": (
        talk("<video>?", videos=[["a.png"] * 4]),
        written(user=f"<|vision_start|><0.2 seconds>{GROUP}<1.2 seconds>{GROUP}<|vision_end|>?", assistant="yo"),
    ),
    "frames at a rate of their own": (
        talk("<video>?", videos=[{"video": ["a.png"] * 4, "fps": 1}]),
        written(user=f"<|vision_start|><0.5 seconds>{GROUP}<2.5 seconds>{GROUP}<|vision_end|>?", assistant="yo"),
    ),
    "slow frames in a part": (
        talk([{"type": "video", "video": ["a.png"] * 4, "fps": 0.25}, {"type": "text", "text": "?"}]),
        written(user=f"<|vision_start|><2.0 seconds>{GROUP}<10.0 seconds>{GROUP}<|vision_end|>?", assistant="yo"),
    ),
    "a rate for a part whose path is listed": (
        talk([{"type": "video", "fps": 1}, {"type": "text", "text": "?"}], videos=[["a.png"] * 2]),
        written(user=f"<|vision_start|><0.5 seconds>{GROUP}<|vision_end|>?", assistant="yo"),
    ),
    # answers
    "an empty answer": (talk("hi", ""), written(user="hi", assistant="")),
    "an answer of white space": (talk("hi", " \n\t"), written(user="hi", assistant=" \n\t")),
    "an answer that begins with line ends": (talk("hi", "\n\nyo"), written(user="hi", assistant="\n\nyo")),
    "jinja in the text": (talk("{{ 1/0 }}{% if %}", "{# x #}"), written(user="{{ 1/0 }}{% if %}", assistant="{# x #}")),
    "windows' line ends": (talk("a\r\nb", "c\r\n"), written(user="a\r\nb", assistant="c\r\n")),
    "joiners and a byte order mark": (
        talk("\ufeff👩‍🔬\u200b", "नमस्\u200dते"),
        written(user="\ufeff👩‍🔬\u200b", assistant="नमस्\u200dते"),
    ),
    "letters that a tokenizer composes": (talk("e\u0301", "A\u030a"), written(user="\u00e9", assistant="\u00c5")),
    "separators of lines": (talk("a\u2028b\x85c", "d\x0be"), written(user="a\u2028b\x85c", assistant="d\x0be")),
    "think marks of a model that has none": (
        talk("hi", "<think>a</think> b </think> <think>"),
        written(user="hi", assistant="<think>a</think> b </think> <think>"),
    ),
    "the assistant first": (
        {"messages": [said("assistant", "yo"), *talk()["messages"]]},
        written(assistant="yo", user="hi", assistant_="yo"),
    ),
    "two answers in a row": (
        {"messages": [*talk()["messages"], said("assistant", "again")]},
        written(user="hi", assistant="yo", assistant_="again"),
    ),
    "words of the format as text": (
        talk("im_start assistant\n", "user\nassistant\n"),
        written(user="im_start assistant\n", assistant="user\nassistant\n"),
    ),
}

LEARNED: dict[str, tuple[dict[str, Any], str]] = {  # name -> (entry, what is learned)
    "a turn that is not learned": (
        {
            "conversations": [
                turn("human", "a"),
                turn("gpt", "WRONG", loss=False),
                turn("human", "b"),
                turn("gpt", "right"),
            ]
        },
        f"right{END}",
    ),
    "a message that is not learned": (
        {"messages": [*talk("a", "b")["messages"], said("user", "c"), said("assistant", "d", loss=False)]},
        f"b{END}",
    ),
    "a call that is not learned": (
        {
            "messages": [
                said("user", "hi"),
                said("tool_call", json.dumps(CALL), loss=False),
                said("tool_response", "7"),
                said("assistant", "7 C"),
            ]
        },
        f"7 C{END}",
    ),
    "steps of tools": (
        {
            "messages": [
                said("user", "hi"),
                said("assistant", "I look.", tool_calls=[CALL, CALL]),
                said("tool", "7"),
                said("tool", [{"type": "image", "image": "a.png"}]),
                said("assistant", "7 C"),
            ],
        },
        f"I look.\n{WRITTEN_CALL}\n{WRITTEN_CALL}{END}7 C{END}",
    ),
    "markers in an answer": (talk("<image>", HTML, **ONE), HTML + END),
    "two answers in a row": ({"messages": [*talk()["messages"], said("assistant", "again")]}, f"yo{END}again{END}"),
    "an answer of white space": (talk("hi", " \n"), f" \n{END}"),
    "a long answer": (talk("hi", "wörd \n" * 20_000), "wörd \n" * 20_000 + END),
}

_URL = "data:image/png;base64,"
REFUSED: dict[str, tuple[Any, str]] = {  # name -> (entry, a piece of the sentence)
    # keys of an entry
    "a system prompt beside messages": (talk(system="x"), "unknown key 'system' of an entry in format messages"),
    "images of another name": (talk(image_path=["a.png"]), "unknown key 'image_path' of an entry"),
    "a column of grounding": (talk(objects={"ref": [], "bbox": []}), "unknown key 'objects' of an entry"),
    "preferences": (talk(rejected_response="x"), "unknown key 'rejected_response' of an entry"),
    "a label of KTO": (talk(label=True), "unknown key 'label' of an entry"),
    "an answer beside the messages": (talk(solution="4"), "unknown key 'solution' of an entry"),
    "a rate beside the entry": (talk("<video>?", videos=[["a.png"] * 4], fps=1.0), "unknown key 'fps' of an entry"),
    "sizes beside the entry": (talk("<image>", width=8, **ONE), "unknown key 'width' of an entry"),
    "a key as long as a text": (talk(**{"x" * 50_000: 1}), "(50002 characters) of an entry"),
    "one key twice": ('[{"messages": [], "messages": []}]', "key 'messages' stands twice in one object"),
    "keys of two formats": (talk(conversations=[turn("human", "hi")]), "has the keys of messages and sharegpt"),
    "text of pretraining": ({"text": "hi"}, "has the keys ['text']; set data.format and data.columns"),
    "a null of a key that no format has": (talk(image_path=None), "unknown key 'image_path' of an entry"),
    "a file of a table in base64": (
        talk("<image>", images=[{"bytes": "aGk=", "path": None}]),
        "a path of 'images' must",
    ),
    # keys of a turn
    "a weight of a turn": (
        {"conversations": [turn("human", "hi"), turn("gpt", "yo", weight=0)]},
        "message 1: unknown key 'weight' of a turn",
    ),
    "images in a message": (
        {"messages": [said("user", "hi", images=["a.png"]), said("assistant", "yo")]},
        "message 0: unknown key 'images' of a message of the user",
    ),
    "a training flag of another name": (
        {"messages": [said("user", "hi"), said("assistant", "yo", train=False)]},
        "message 1: unknown key 'train' of a message of the assistant",
    ),
    "a thought of another name": (
        {"messages": [said("user", "hi"), said("assistant", "yo", reasoning="hm")]},
        "unknown key 'reasoning' of a message of the assistant, nearest is 'reasoning_content'",
    ),
    "a call of the first chat API": (
        {"messages": [said("user", "hi"), said("assistant", None, function_call=CALL)]},
        "unknown key 'function_call' of a message of the assistant, nearest is 'tool_calls'",
    ),
    "a name of a user": ({"messages": [said("user", "hi", name="Bo")]}, "unknown key 'name' of a message of the user"),
    "a speaker of another format": ({"conversations": [turn("user", "hi")]}, "'from' must be one of ["),
    "a role of another format": ({"messages": [said("model", "hi")]}, "'role' must be one of ["),
    # keys of a part
    "the path key of a library": (
        shown({"type": "image", "path": "a.png"}),
        "unknown key 'path' of a part of type image",
    ),
    "the url key of a library": (shown({"type": "image", "url": "a.png"}), "unknown key 'url' of a part of type image"),
    "bytes in text": (shown({"type": "image", "base64": "aGk="}), "unknown key 'base64' of a part of type image"),
    "a detail of an API": (
        shown({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
        "unknown key 'detail' of an image_url",
    ),
    "a budget of all frames": (
        shown({"type": "video", "video": ["a.png"] * 2, "total_pixels": 1}),
        "unknown key 'total_pixels' of a part of type video",
    ),
    "a rate that was measured": (
        shown({"type": "video", "video": ["a.png"] * 2, "sample_fps": 1}),
        "unknown key 'sample_fps' of a part of type video",
    ),
    "the setting of a cache": (
        talk([{"type": "text", "text": "hi", "cache_control": {}}]),
        "unknown key 'cache_control' of a part of type text",
    ),
    "a part without a type": (talk([{"image": "a.png"}, {"text": "?"}]), "a part needs a 'type' of text, image, video"),
    "sound of an API": (
        shown({"type": "input_audio", "input_audio": {"data": "A" * 90_000, "format": "wav"}}),
        "a part needs a 'type' of text, image, video or audio, got",
    ),
    "a thought as a part": (
        {"messages": [said("user", "hi"), said("assistant", [{"type": "thinking", "thinking": "hm"}])]},
        "message 1: a part needs a 'type'",
    ),
    "a setting as text": (shown({"type": "image", "image": "a.png", "max_pixels": "64"}), "'max_pixels' of a part"),
    "one frame": (talk("<video>?", videos=[["a.png"]]), "a video needs at least 2 frames, got 1; pass it as images"),
    "frames of several sizes": (talk("<video>?", videos=[["a.png", "ä b.png"]]), "must have one size, got"),
    "no frame at all": (talk("<video>?", videos=[[]]), "a path of 'videos' must be a non-empty string"),
    "a picture for a video": (talk("<video>?", videos=["a.png"]), "a.png"),
    "no pixel at all": (
        shown({"type": "image", "image": "a.png", "max_pixels": 0}),
        "must be an integer above 0, got 0",
    ),
    "a negative size": (
        shown({"type": "image", "image": "a.png", "max_pixels": -1}),
        "must be an integer above 0, got -1",
    ),
    "a height without a width": (shown({"type": "image", "image": "a.png", "resized_height": 8}), "resized_width"),
    "more pixels than there is memory": (
        shown({"type": "image", "image": "a.png", "min_pixels": 2**31 - 1}),
        "its patches have 12886598016 values, more than 536870912; lower min_pixels, max_pixels or resized_height",
    ),
    "a side as long as a coast": (
        shown(
            {"type": "image", "image": "a.png", "resized_height": 60_000, "resized_width": 60_000, "max_pixels": 2**30}
        ),
        "lower min_pixels, max_pixels or resized_height and resized_width",
    ),
    "a number beyond all": (
        shown({"type": "image", "image": "a.png", "min_pixels": 10**18}),
        "'min_pixels' of a part of type image must be below 2147483648, got 1000000000000000000",
    ),
    "frames larger than there is memory": (
        talk("<video>?", videos=[{"video": ["a.png"] * 4, "min_pixels": 2**31 - 1}]),
        "4 frames of",
    ),
    "true for a number": (
        shown({"type": "image", "image": "a.png", "max_pixels": True}),
        "an integer above 0, got True",
    ),
    "no number at all": ('[{"messages": [], "fps": NaN}]', "NaN is no JSON number"),
    "numbers of frames of a list": (
        talk("<video>?", videos=[{"video": ["a.png"] * 4, "nframes": 2}]),
        "all frames of a list are taken, so that nframes has no meaning; list fewer",
    ),
    "sound of a list of frames": (
        talk("<video>?", videos=[{"video": ["a.png"] * 2, "use_audio_in_video": True}]),
        "use_audio_in_video is on, but a list of frames has no sound; set it to false for this video",
    ),
    "no rate at all": (talk("<video>?", videos=[{"video": ["a.png"] * 2, "fps": 0}]), "fps"),
    "half of a list of frames": (
        talk("<video>?", videos=[{"video": ["a.png"] * 2, "video_end": 1.0}]),
        "all frames of a list are taken, so that video_end has no meaning",
    ),
    # markers of users that mean text, and media that nothing stands for
    "an image that nothing stands for": (talk("What?", **ONE), "it has 0 image placeholders for 1 images; write one"),
    "one marker too many": (
        talk("<image>What does the <image> tag do?", **ONE),
        "it has 2 image placeholders for 1 images; write one <image> for each, in a turn of the user (where <image> is",
    ),
    "an image of the system": (
        {"messages": [said("system", [{"type": "image", "image": "a.png"}]), *talk()["messages"]]},
        "media cannot stand in a message of the system; move them to the user's",
    ),
    "the token of the model": (talk(IMAGE), "message 0 holds '<|image_pad|>'"),
    "the end of a turn in an answer": (talk("hi", "yo<|im_end|>"), "message 1 holds '<|im_end|>'"),
    "the end of a text in an answer": (talk("hi", "yo<|endoftext|>"), "message 1 holds '<|endoftext|>'"),
    "sound for a model that is deaf": (talk("<audio>?", audios=["a.wav"]), "the model takes no sound"),
    # paths
    "a path out of the root": (talk("<image>", images=["/etc/hostname"]), "leaves the media root"),
    "a path upwards": (talk("<image>", images=["../a.png"]), "leaves the media root"),
    "a path down and up": (talk("<image>", images=["sub/../../a.png"]), "leaves the media root"),
    "a folder": (talk("<image>", images=["sub"]), "sub"),
    "a path of Windows": (talk("<image>", images=["C:\\data\\a.png"]), "names no file in the media root"),
    "a file that is not there": (talk("<image>", images=["b.png"]), "names no file in the media root"),
    "a name of another case": (talk("<image>", images=["A.PNG"]), "names no file in the media root"),
    "a path with a space at its end": (talk("<image>", images=["a.png "]), "names no file in the media root"),
    "a home": (talk("<image>", images=["~/a.png"]), "names no file in the media root"),
    "bytes of a file in its place": (talk("<image>", images=["iVBORw0KGgo" + "A/" * 90_000]), "(180013 characters)"),
    "a long name": (talk("<image>", images=["a" * 300 + ".png"]), "names no file in the media root"),
    "a data URL": (talk("<image>", images=[_URL + "A" * 200_000]), "'images' hold the URL 'data:image/png;base64,AAA"),
    "a data URL in a part": (shown({"type": "image", "image": _URL + "A" * 90_000}), "'images' hold the URL 'data:"),
    "a data URL of an API": (
        shown({"type": "image_url", "image_url": {"url": _URL + "A" * 90_000}}),
        "'images' hold the URL 'data:image/png;base64,AAA",
    ),
    "a file URL": (talk("<image>", images=[f"file://{ROOT}/a.png"]), "write its path alone"),
    "a web address": (talk("<image>", images=["https://x.org/a.png"]), "save it as a file and write its path"),
    "a bucket": (talk("<video>", videos=["s3://x/a.mp4"]), "'videos' hold the URL 's3://x/a.mp4'"),
    "a null byte": (talk("<image>", images=["a.png\0"]), "without null characters"),
    # one thing where another is due
    "an object for the list of images": (talk("<image>", images={"image": "a.png"}), "must be a list of paths, got"),
    "a list in the list of images": (
        talk("<image>", images=[["a.png"]]),
        "a path of 'images' must be a non-empty string",
    ),
    "null in the list of images": (talk("<image>", images=[None]), "a path of 'images' must be a non-empty string"),
    "an object of an API in the list": (talk("<image>", images=[{"url": "a.png"}]), "a path of 'images' must be"),
    "a tool for the list of tools": (talk(tools={"name": "f"}), "'tools' must be a list of JSON schemas, got"),
    "a call for the list of calls": (
        {"messages": [said("user", "hi"), said("assistant", "", tool_calls=CALL)]},
        "'tool_calls' must be a list of calls, got",
    ),
    "messages as a JSON string": (
        {"messages": json.dumps(talk()["messages"])},
        "'messages' must be a list of at least",
    ),
    "a message for the list of messages": (
        {"messages": said("user", "hi")},
        "'messages' must be a list of at least one",
    ),
    "a part for the list of parts": (talk({"type": "text", "text": "hi"}), "'content' must be a string or a list of"),
    "a number for a text": (talk("hi", 7), "message 1: 'content' must be a string or a list of parts, got 7"),
    "null for a text": (talk("hi", None), "message 1: 'content' must be a string or a list of parts, got None"),
    "arguments as a list": (
        {"messages": [said("user", "hi"), said("assistant", "", tool_calls=[{**CALL, "arguments": [1]}])]},
        "'arguments' must be an object or JSON of one",
    ),
    "results in another order": (
        {
            "messages": [
                said("user", "hi"),
                said("assistant", "", tool_calls=[{**CALL, "id": "1"}, {**CALL, "id": "2"}]),
                said("tool", "7", tool_call_id="2"),
            ]
        },
        "message 2: 'tool_call_id' is '2' but the call in its place has '1'",
    ),
    "an entry that is a list": ([[said("user", "hi")]], "an entry must be an object, got list"),
    "no messages": ({"messages": []}, "'messages' must be a list of at least one message"),
    "a later system turn": ({"messages": [*talk()["messages"], said("system", "x")]}, "must come first"),
    "thoughts that the template has no place for": (
        {"messages": [said("user", "hi"), said("assistant", "yo", reasoning_content="hm")]},
        "the chat template has no place for 'reasoning_content'",
    ),
    "half a character": (r'[{"messages": [{"role": "user", "content": "\ud83d"}]}]', "which is half a character"),
}

"""Data: files of conversations with media -> packed micro-batches, in an order that is a function of (seed, step)."""

from mmfn.train.data.agree import Agreed, Share, Stats, agree, stats
from mmfn.train.data.audio import decode_audio
from mmfn.train.data.dataset import Dataset
from mmfn.train.data.image import decode_image
from mmfn.train.data.loader import Loader
from mmfn.train.data.processor import Processor, encode_sample, load_processor
from mmfn.train.data.template import Chat, Encoded, encode, make_chat
from mmfn.train.data.tokenizer import load_tokenizer
from mmfn.train.data.video import decode_frames, decode_video
from mmfn.train.data.workers import Workers, prefetch
from mmfn.train.limits import Limits

__all__ = [
    "Agreed",
    "Chat",
    "Dataset",
    "Encoded",
    "Limits",
    "Loader",
    "Processor",
    "Share",
    "Stats",
    "Workers",
    "agree",
    "decode_audio",
    "decode_image",
    "decode_frames",
    "decode_video",
    "encode",
    "encode_sample",
    "load_processor",
    "load_tokenizer",
    "make_chat",
    "prefetch",
    "stats",
]

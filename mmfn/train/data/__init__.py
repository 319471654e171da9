"""Data: files of conversations with media -> packed micro-batches, in an order that is a function of (seed, step)."""

from mmfn.train.data.dataset import Dataset
from mmfn.train.data.image import ImageSpec, decode_image, preprocess_image
from mmfn.train.data.loader import Agreed, Loader, Share, Stats, agree, prefetch, stats
from mmfn.train.data.processor import Processor, load_processor
from mmfn.train.data.template import Chat, Encoded, VideoText, encode, make_chat
from mmfn.train.data.tokenizer import load_tokenizer
from mmfn.train.data.video import VideoSpec, decode_video, preprocess_video

__all__ = [
    "Agreed",
    "Chat",
    "Dataset",
    "Encoded",
    "ImageSpec",
    "Loader",
    "Processor",
    "Share",
    "Stats",
    "VideoSpec",
    "VideoText",
    "agree",
    "decode_image",
    "decode_video",
    "encode",
    "load_processor",
    "load_tokenizer",
    "make_chat",
    "prefetch",
    "preprocess_image",
    "preprocess_video",
    "stats",
]

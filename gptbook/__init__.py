"""gptbook: everything around a small GPT, built from scratch, checked and measured.

    import gptbook
    model, tokenizer = gptbook.load_demo()

Each module is one page of the book: `gptbook.core` is the model, `gptbook.tokenizer` text
to tokens, and so on. Importing one gives its technique; importing `gptbook` gives the names
below. Plots and notebooks need extras: `pip install "gptbook[plots,notebook]"`.
"""

__version__ = "0.1.0"

from gptbook.attention import capture_attention
from gptbook.beam import beam_search
from gptbook.checkpoints import CheckpointError, load_demo, load_model, save_model
from gptbook.core import GPTConfig, GPTModel, pick_device, set_seed
from gptbook.decoder import Decoder
from gptbook.generation import generate_text, stream_text
from gptbook.inference import KVCache
from gptbook.quantization import quantize
from gptbook import pruning, qat, recipes, structured_pruning  # noqa: F401, they register
from gptbook.runs import TrainConfig
from gptbook.sampler import Sampler
from gptbook.tokenizer import Tokenizer, train_bpe
from gptbook.training import train

__all__ = [
    "CheckpointError", "Decoder", "GPTConfig", "GPTModel", "KVCache", "Sampler", "TrainConfig",
    "Tokenizer", "beam_search", "capture_attention", "generate_text", "load_demo", "load_model",
    "pick_device", "quantize", "save_model", "set_seed", "stream_text", "train", "train_bpe",
]

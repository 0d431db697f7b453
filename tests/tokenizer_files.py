"""Tiny tokenizers of each kind, trained on sentences of code and prose."""

import base64
import json

TEXTS = [
    "def area(width, height):\n    if width < 0:\n        return None\n    return width * height\n\n",
    "The quick brown fox jumps over the lazy dog; it's 12345 o'clock.\n\n\tThen it naps.\r\n",
    'class Größe:\n    """Docs — with a dash."""\n\n    def __init__(self):\n        self.x = [1, 2, 3]\n',
]
HARD_TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\n",
    "a\r\nb\tc\n",
    "    indented\n        more\n",
    "日本語 ελληνικά 🙂\u200d🙂 \U0001f468\u200d\U0001f469",
    "\x00\x01\x7f",
    "<unk><s></s><0x41>",
    "don't we'll I'm 3.14159 1234567",
]


def write_sentencepiece(folder, vocab_size=400, **options):
    """Train a SentencePiece model; returns its path."""
    from megatron.data.tokenizer.train import train_sentencepiece

    path = folder / "tiny.model"
    train_sentencepiece(TEXTS * 20, path, vocab_size=vocab_size, **options)
    return path


def write_gpt2_files(folder, vocab_size=320):
    """Train byte-level BPE; returns the paths of vocab.json and merges.txt. `<|endoftext|>` is id 0."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=vocab_size, min_frequency=1, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder))
    return folder / "vocab.json", folder / "merges.txt"


def write_tokenizer_json(folder, special_tokens=("<|endoftext|>",), eos_token=None):
    """Train a `tokenizer.json`, with truncation stored in it as some published ones have; returns its path."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=420, min_frequency=1, special_tokens=list(special_tokens))
    tokenizer.enable_truncation(max_length=3)
    tokenizer.save(str(folder / "tokenizer.json"))
    if eos_token is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    return folder / "tokenizer.json"


def write_tiktoken(folder, num_ranks=50256):
    """Write a file of ranks with all single bytes and then pairs; returns its path."""
    pairs = (bytes(pair) for pair in ((a, b) for a in range(32, 256) for b in range(256)))
    tokens = [bytes([byte]) for byte in range(256)] + [next(pairs) for _ in range(num_ranks - 256)]
    path = folder / "tiny.tiktoken"
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    path.write_text("".join(lines))
    return path

"""What Tuoling writes into a GGUF file beside llama.cpp's own keys, and reads from it to chat as the run did."""

from __future__ import annotations

TEMPLATE = "tuoling.template"
"""Id of the template."""

STOPS = "tuoling.stops"
"""JSON list of the strings that end a reply besides the end token."""

SYSTEM = "tuoling.system"
"""The system text the model was tuned with."""

GENERATION = "tuoling.generation"
"""JSON object: the folder's generation_config.json, without token ids."""

MARKS_AFTER_SPECIAL = "tuoling.marks_after_special"
"""Whether the tokenizer puts a word mark in front of text behind a special token; llama.cpp always does."""

MARKS_SPACES = "tuoling.marks_spaces"
"""Whether a text that begins with a space gets a word mark in front of it too, as llama.cpp does."""

NORMAL_FORM = "tuoling.nfc"
"""Whether text is brought into Unicode's normal form C first; llama.cpp never does."""

PROVENANCE = "tuoling.provenance"
"""JSON object: hashes of the base's config and of the data, seed and version."""

SETTINGS = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
"""Keys of GENERATION. Beams are left out: llama.cpp has none."""

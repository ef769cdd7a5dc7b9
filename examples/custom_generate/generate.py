"""Put this folder beside a model's config.json: its ``generate`` is then adi's, in whatever loads it with trust_remote_code."""

from adi.attached import custom_generate as generate  # noqa: F401

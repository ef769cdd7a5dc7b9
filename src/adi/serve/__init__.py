"""``adi serve``: one model, many clients, by the protocol that OpenAI's clients speak."""

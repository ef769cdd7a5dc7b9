"""``adi audit``: the user's own proof, on their model and machine, that verified decoding changes nothing."""

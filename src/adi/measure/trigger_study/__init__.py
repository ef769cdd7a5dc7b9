"""How well each signal tells, and which rule pays."""

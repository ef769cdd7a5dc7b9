"""How well each signal predicts that an exit is right, and which rule pays."""

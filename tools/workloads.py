"""Write ``src/adi/data/prompts/workloads.jsonl``: three kinds of work that come again and again with other details.

Orders to be turned into JSON, messages of customers to be answered, and product texts to be written from facts: a hundred
prompts of each, drawn from the lists below with a seed. Run it from the root of the repository: python tools/workloads.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

SEED, EACH = 7, 100
OUT = Path("src/adi/data/prompts/workloads.jsonl")


def words(text: str) -> list[str]:
    """The parts of a list with commas."""
    return text.split(", ")


FIRST = words(
    "Maria, Tom, Aisha, Peter, Lena, Omar, Grace, Ivan, Chloe, Daniel, Priya, Hugo, Nadia, Sam, Elena, Felix, Ruth, "
    "Marco, Yuki, Ben"
)
LAST = words(
    "Lopez, Baker, Khan, Novak, Fischer, Haddad, Moore, Petrov, Dubois, Green, Shah, Larsen, Silva, Wright, Rossi, "
    "Meyer, Stone, Sato"
)
STREETS = words("Mill Road, Church Street, Park Lane, Station Road, High Street, Garden Way, River Walk, Oak Avenue")
CITIES = words("Leeds, Bristol, Cardiff, Oxford, York, Dundee, Norwich, Exeter, Bath, Lincoln")
DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday")
GOODS = words(
    "blue mugs, tea towels, oak chopping boards, glass jars, candles, linen napkins, bread baskets, soup bowls, "
    "wooden spoons, cushions, picture frames, coat hooks, plant pots, table lamps, wool blankets, door mats"
)
CAMPING = words(
    "tent, sleeping bag, camping stove, rucksack, head torch, folding chair, rain jacket, water filter, hiking poles, cool box"
)
TROUBLES = (
    "arrived with a broken zip",
    "has not arrived yet, and the tracking page has not changed for six days",
    "is the wrong colour: I ordered green and got grey",
    "is smaller than I thought, and I would like to exchange it for a larger one",
    "came without the instructions",
    "stopped working after two trips",
    "was delivered to my neighbour, who has left a dent in it",
    "was charged twice on my card",
)
WISHES = (
    "Can you help?",
    "What should I do now?",
    "Please tell me how long this will take.",
    "I would like my money back.",
    "I need it by {day}.",
    "I have been a customer for {years} years and was a little disappointed.",
)
PRODUCTS = (
    ("desk lamp", "brushed steel", "for reading late"),
    ("backpack", "waxed canvas", "for commuting by bicycle"),
    ("coffee grinder", "ceramic and beech", "for small kitchens"),
    ("garden bench", "larch wood", "for two people"),
    ("notebook", "recycled paper", "for daily sketches"),
    ("kettle", "enamelled steel", "for gas and induction"),
    ("rug", "pure wool", "for hallways"),
    ("bicycle bell", "solid brass", "for city streets"),
    ("scarf", "merino wool", "for cold mornings"),
    ("wall clock", "birch plywood", "for living rooms"),
    ("water bottle", "stainless steel", "for long walks"),
    ("storage box", "woven willow", "for toys and blankets"),
)
COLOURS = words("forest green, charcoal, cream, navy blue, brick red, mustard yellow, light grey, black")
EXTRAS = (
    "made by hand in Wales",
    "comes with a two-year guarantee",
    "delivered in a gift box",
    "easy to clean",
    "repaired free of charge for life",
    "packed without plastic",
)


def order(dice: random.Random) -> str:
    """An order in a customer's words."""
    name, street = f"{dice.choice(FIRST)} {dice.choice(LAST)}", f"{dice.randrange(1, 99)} {dice.choice(STREETS)}"
    items = [f"{dice.randrange(2, 13)} {goods}" for goods in dice.sample(GOODS, dice.choice((1, 2, 2, 3)))]
    listed = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    city, day = dice.choice(CITIES), dice.choice(DAYS)
    text = dice.choice(
        (
            f"Hello, this is {name}. I would like {listed}, sent to {street}, {city}, by {day}. Thank you!",
            f"Please send {listed} to {street} in {city}. I need them on {day}. {name}",
            f"Hi there, could I order {listed}? My address is {street}, {city}. {day} would be best. Kind regards, {name}",
            f"{name} here, {street}, {city}. We are running out of {goods_of(items[0])}: send {listed} before {day}, please.",
        )
    )
    return (
        "Turn this order into JSON with the keys customer, street, city, day and items, where items is a list of objects with "
        f"the keys name and quantity. Answer with the JSON alone.\n\nOrder: {text}"
    )


def goods_of(item: str) -> str:
    return item.partition(" ")[2]


def reply(dice: random.Random) -> str:
    """A customer's message to be answered."""
    wish = dice.choice(WISHES).format(day=dice.choice(DAYS), years=dice.randrange(2, 11))
    what = f"the {dice.choice(CAMPING)} that I ordered on {dice.choice(DAYS)} {dice.choice(TROUBLES)}"
    number, name = dice.randrange(10000, 99999), dice.choice(FIRST)
    text = dice.choice(
        (
            f"Hello, {what}. My order number is {number}. {wish} {name}",
            f"Dear Fernhill team, {what} (order {number}). {wish} Regards, {name}",
            f"Order {number}: {what}. {wish} Thanks, {name}",
        )
    )
    return (
        "You answer customers of Fernhill Outdoor, a shop for camping gear. Write a short and friendly reply to this message: "
        "thank the customer, say what will happen next, and sign as the Fernhill team.\n\n"
        f"Message: {text}"
    )


def product(dice: random.Random) -> str:
    """A product text to be written from facts."""
    name, material, use = dice.choice(PRODUCTS)
    extra = dice.choice(EXTRAS)
    return (
        "Write a product description of about 70 words for our online shop. Use only these facts.\n\n"
        f"Product: {name}\nMaterial: {material}\nColour: {dice.choice(COLOURS)}\nUse: {use}\n"
        f"Size: {dice.randrange(10, 90)} cm\nPrice: {dice.randrange(12, 190)} pounds\nAlso: {extra}"
    )


def main() -> None:
    """Distinct prompts of the three kinds in turn."""
    kinds: dict[str, Callable[[random.Random], str]] = {"orders": order, "replies": reply, "products": product}
    dice, found = random.Random(SEED), list[list[tuple[str, str]]]()
    for kind, draw in kinds.items():
        mine = dict[str, str]()
        while len(mine) < EACH:
            mine[draw(dice)] = kind
        found.append(list(mine.items()))
    in_turn = [row for rows in zip(*found, strict=True) for row in rows]
    OUT.write_text("".join(json.dumps({"prompt": text, "category": kind}) + "\n" for text, kind in in_turn))


if __name__ == "__main__":
    main()

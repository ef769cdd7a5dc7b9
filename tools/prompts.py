"""Many distinct prompts from topics and tasks, for training drafters: `python tools/prompts.py > prompts.jsonl`.

The prompts of the benchmark are not among them, and are never trained on.
"""

from __future__ import annotations

import json
import random

TOPICS = """
the water cycle; beekeeping; the French Revolution; black holes; baking bread; electric cars; chess openings; the human
heart; volcanoes; renting a flat; learning the piano; a lost dog; the Roman army; photosynthesis; a broken bicycle; the
moon; job interviews; coral reefs; public libraries; the immune system; a power cut; glaciers; saving money; the Silk
Road; tea; a school reunion; wind turbines; owls; earthquakes; a night train; gardening on a balcony; the printing
press; sleep; a noisy neighbour; vaccines; mountain rescue; the Olympic Games; cheese; remote work; deserts; a first day
at school; antibiotics; knitting; the stock market; hurricanes; a family recipe; robots; whales; the Industrial
Revolution; a lighthouse keeper; recycling; jazz; an old map; diabetes; football; rivers; city traffic; the violin;
spiders; a job in a bakery; solar panels; the pyramids; stage fright; migration of birds; a village market; the
internet; bridges; honey; allergies; camping in the rain; inflation; dinosaurs; a museum visit; the brain; running a
marathon; typewriters; a hospital ward; tides; the Renaissance; a new puppy; public speaking; salt; steam engines; a
small island; nutrition; the Cold War; mushrooms; a secret letter; gravity; film music; a difficult customer; the Amazon
rainforest; carpentry; time zones; the violin maker; snow; elections; a flooded cellar; ants; perfume; credit cards; the
Great Wall; a birthday party; fog; telescopes; the postal service; a haunted house; fermentation; swimming; language
learning
"""

TASKS = {
    "writing": (
        "Write a short story about {t}.",
        "Write a poem of three stanzas about {t}.",
        "Write a friendly email to a colleague who asked about {t}.",
        "Write an opening paragraph for a magazine article on {t}.",
    ),
    "question-answering": (
        "Explain {t} to a ten-year-old.",
        "What are the most important things to know about {t}?",
        "Why does {t} matter? Answer in one paragraph.",
        "Give me five interesting facts about {t}.",
        "What are the advantages and disadvantages connected with {t}?",
        "What is a common misunderstanding about {t}, and what is true?",
    ),
    "chat": (
        "I've been thinking about {t} lately. Where should I start if I want to know more?",
        "Hi! Can you help me plan a weekend that has something to do with {t}?",
        "My friend asked me about {t} and I had no answer. What should I have said?",
        "Give me a list of ten ideas for a talk about {t}.",
    ),
    "code": (
        "Write a Python class that stores records about {t} and can search them by name.",
        "Write a Python function that reads a CSV file about {t} and prints the three largest values of its second column.",
        "Write an SQL schema with two tables for an application about {t}, and one example query.",
        "Write a small HTML page about {t} with a heading, a list and a table.",
        "Write a JavaScript function that filters a list of objects about {t} by year and sorts them by title.",
    ),
    "extraction": (
        "List the key terms that someone writing about {t} would use, as a JSON array of strings.",
        "Make a table with three columns (term, meaning, example) about {t}.",
        "Write three questions about {t}, each with a short answer, as JSON with the keys question and answer.",
    ),
    "translation": (
        "Write two sentences about {t} in English, then translate them into French.",
        'Translate into Spanish: "Yesterday we talked about {t} for an hour."',
        'How would one say "I would like to learn more about {t}" in German?',
    ),
    "summarisation": (
        "Summarise what is generally known about {t} in three sentences.",
        "Write a paragraph about {t}, then a one-sentence summary of it.",
    ),
    "math": (
        "Make up a word problem about {t} with two steps, and solve it.",
        "A club about {t} has {n} members, and each pays {m} euros a year. A third of the money goes on rent. "
        "How much is left?",
        "{n} people came to an event about {t}; {m} of them left early. What percentage stayed? Show the steps.",
    ),
}


def main() -> None:
    """Every topic with every task, in a fixed shuffled order."""
    rng = random.Random(0)
    topics = [topic.strip() for topic in TOPICS.replace("\n", " ").split(";")]
    rows = [
        {"prompt": task.format(t=topic, n=rng.randrange(30, 400), m=rng.randrange(5, 30)), "category": category}
        for topic in topics
        for category, tasks in TASKS.items()
        for task in tasks
    ]
    rng.shuffle(rows)
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()

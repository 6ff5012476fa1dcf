"""Writes the prompts of the quickstart: neutral openings of film reviews, 8 to 14 words, cut in mid-sentence; and those to train on
with reference answers that like the film, for algorithms that need some.

    python benchmarks/make_film_reviews.py [FOLDER]

The same program writes the same files, byte for byte. Openings whose own sentiment (VADER compound) is not near zero are left out,
so that what the oracle sees comes from the continuation.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from pathlib import Path

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

FOLDER = Path(__file__).parent.parent / "onlinerl" / "prompts" / "data"
SIZES = {"film_reviews_train": 640, "film_reviews_heldout": 160}
ANSWERED = "film_reviews_answered"
"""The prompts of film_reviews_train, with reference answers."""
SEED = 7

FILMS = """film|movie|documentary|short film|silent film|western|drama|road movie|period piece|science fiction film|
animated feature|sequel|remake|adaptation|musical|courtroom drama|spy film|heist film|family film|sports drama|biography|
three-hour epic|detective story|debut feature|anthology|black-and-white film|stop-motion film|coming-of-age story|concert film|
television film|costume drama|martial arts film|nature documentary|mockumentary""".replace("\n", "").split("|")

MAKERS = """a director from Lisbon|two brothers from Ohio|a studio in Seoul|a first-time director|a crew of nine people|
a former editor|the team behind the earlier series|a playwright from Dublin|a small company in Montreal|an old film school class|
a painter turned director|the same people as last year|a retired camera operator|a theatre group from Prague""".replace(
    "\n", ""
).split("|")

PLACES = """on a train|on a plane to Oslo|at the cinema near my office|in a room with forty students|
on my sister's laptop|in the front row|at home with my parents|at a morning screening|in a tent at the coast|
last night|two weeks ago|over the weekend|during a long layover|at the old theatre downtown|with my neighbours|after work|
on a phone screen|between two meetings|on the opening day|at the local library|with subtitles|without knowing the book|
in the last week of March|with a class of mine|at midnight|in a hotel room|on television|from the balcony""".replace(
    "\n", ""
).split("|")

ASPECTS = """the script|the first half|the second half|the music|the lead actor|the lead actress|the camera work|the dialogue|
the editing|the final scene|the opening scene|the whole cast|the pacing|the ending|the plot|the sound|the set design|
the main character|the narrator|the middle part|the last twenty minutes|the costumes|the colours|
the way it was shot|the story|the voice of the narrator|the scenes at the harbour|the conversations|the direction|
the part in the city|the relationship between the brothers|the children in it|the title song""".replace("\n", "").split("|")

VERBS = ["watched", "saw", "rented", "finished", "went to see", "sat through", "rewatched", "caught"]
VIEWERS = ["I", "We", "My brother and I", "My flatmate and I", "My aunt and I", "Our film club", "A colleague and I"]
LENGTHS = [
    "ninety minutes",
    "two hours",
    "half an hour",
    "twenty minutes",
    "almost three hours",
    "an hour and a half",
    "fifty minutes",
]
LINKS = [
    "and",
    "and to me",
    "and I thought that",
    "and I would say that",
    "and from the start",
    "and overall",
    "and I found that",
]

TEMPLATES = [
    "{viewer} {verb} this {film} {place} {link} {aspect}",
    "{viewer} {verb} this {film} {place} and {aspect}",
    "{viewer} {verb} a {film} by {maker} and {aspect}",
    "The {film} {place} and {aspect}",
    "This {film} is by {maker} {link} {aspect}",
    "After {length} of this {film} I knew that {aspect}",
    "What I remember about this {film} by {maker} is {aspect}, which",
    "The {film} {viewer_lower} {verb} {place}: {aspect}",
    "I {verb} this {film} {place} and I have to say {aspect}",
    "It is a {film} about {topic} {link} {aspect}",
    "A {film} about {topic} {link} {aspect} and {other}",
    "The {film} about {topic} runs for {length} and {aspect}",
    "Before I {verb} this {film} about {topic}, I thought {aspect}",
    "In this {film} about {topic}, {aspect} and also {other}",
    "{viewer} talked about {aspect} of this {film} because it",
    "Compared with the book, {aspect} of this {film} about {topic}",
    "When {viewer_lower} {verb} the {film} {place}, {aspect} seemed",
    "There is one thing to say about {aspect} of this {film}: it",
]

TOPICS = """a lighthouse keeper|two chess players|a bakery in Naples|the building of a bridge|a school in the mountains|
a family of sailors|a bus driver|a summer in the seventies|a piano teacher|an archive in Vienna|a village in the north|a jazz band|
a translator|the moon landing|a cook and her daughter|a football club|a botanist|a radio station|a tailor in Istanbul|
a cargo ship|a swimming coach|a newspaper office|a long walk across Spain|an orchestra on tour|
a house by a canal|a postman|a man who repairs clocks|three cousins|a mathematician""".replace("\n", "").split("|")

# In the past tense, so that they follow one thing as well as several.
PRAISE = [
    "delighted us from start to finish. I enjoyed every minute and would happily see it again with friends.",
    "gave me real pleasure. It is a charming, honest work, and everybody in the room left with a smile.",
    "moved me, beautifully so. The care that went into it is impressive, and I recommend it with all my heart.",
    "turned out better than I had hoped: funny, warm and clever. It is the best that I have seen this year.",
    "won us over at once, and it kept getting better. I love how kind it is, and I was happy for days.",
    "made my evening. It is a great success for all who worked on it, and a perfect gift for a friend.",
]


def openings(count: int) -> list[str]:
    """`count` different neutral openings, always the same ones."""
    rng = random.Random(SEED)
    analyzer = SentimentIntensityAnalyzer()
    found: dict[str, None] = {}
    for attempt in range(100 * count):
        if len(found) == count:
            return list(found)
        viewer = rng.choice(VIEWERS)
        aspect, other = rng.sample(ASPECTS, 2)
        text = TEMPLATES[attempt % len(TEMPLATES)].format(
            viewer=viewer,
            viewer_lower=viewer if viewer == "I" else viewer[0].lower() + viewer[1:],
            verb=rng.choice(VERBS),
            film=rng.choice(FILMS),
            place=rng.choice(PLACES),
            link=rng.choice(LINKS),
            maker=rng.choice(MAKERS),
            length=rng.choice(LENGTHS),
            topic=rng.choice(TOPICS),
            aspect=aspect,
            other=other,
        )
        text = re.sub(r"\b(a|A) (?=a)", r"\1n ", text)  # an animated feature
        if 8 <= len(text.split()) <= 14 and abs(analyzer.polarity_scores(text)["compound"]) < 0.05:
            found[text] = None
    raise RuntimeError(f"only {len(found)} of {count} openings: add words or templates")


def praised(opening: str, rng: random.Random) -> str:
    """What somebody who likes the film might go on with."""
    return ("perfect and " if opening.endswith(" seemed") else "") + rng.choice(PRAISE)


def line(text: str, **more: str) -> str:
    """A prompt as it stands in the file."""
    return json.dumps({"id": "film-" + hashlib.sha256(text.encode()).hexdigest()[:10], "text": text, **more}) + "\n"


def main(folder: Path) -> None:
    """Write the three files."""
    texts = openings(sum(SIZES.values()))
    random.Random(SEED).shuffle(texts)
    rng = random.Random(SEED)
    train = texts[: SIZES["film_reviews_train"]]
    files = {ANSWERED: [line(text, reference_answer=praised(text, rng)) for text in train]}
    for name, size in SIZES.items():
        part, texts = texts[:size], texts[size:]
        files[name] = [line(text) for text in part]
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)

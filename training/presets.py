"""The named recipes: each with where its numbers come from and when to use it.

What an article does not say is filled with the values of `Recipe` itself. Where the articles disagree (alpha, rate,
dropout, warm-up) the recipes keep the disagreement: they are there to repeat and compare, `recommended` is ours. In one
thing none repeats its article: 001 and 004 train in fp16, which a CPU has no fast products in and which overflows where
bfloat16 does not; here the precision is `auto`.
"""

from __future__ import annotations

from training.errors import UnknownRecipe
from training.recipe import Recipe

ARTICLES = 'Articles 000 to 004: see "The articles" in docs/planner.md.'

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SEVEN_PROJECTIONS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

RECOMMENDED = Recipe(
    name="recommended",
    source="the values on which published LoRA guides agree: alpha twice the rank, all linears, 2e-4, cosine",
    when="a first adapter on 1,000 to 50,000 examples; r 32 to 64 when quality still grows",
)

CONSERVATIVE = Recipe(
    name="conservative",
    source="article 003, the careful column of its guide: r 4, alpha 8, q and v, 1e-4",
    when="few examples, or a change of style that must leave everything else alone; the smallest adapter",
    rank=4,
    alpha=8,
    targets=("q_proj", "v_proj"),
    learning_rate=1e-4,
    batch=4,
    accumulation=4,
    max_length=2048,
)

AGGRESSIVE = Recipe(
    name="aggressive",
    source="article 003, the bold column of its guide: r 64, alpha 128, all linears, 3e-4",
    when="tens of thousands of clean examples of a task far from what the base does; watch the validation loss",
    rank=64,
    alpha=128,
    learning_rate=3e-4,
    batch=4,
    accumulation=4,
    max_length=2048,
)

ARTICLE_000 = Recipe(
    name="article-000",
    source="article 000, three production tasks on LLaMA-2-7B: r 32, alpha 64, seven projections, batch 4 x 8",
    when="repeating that article's LoRA runs, or a production adapter on thousands of long examples",
    rank=32,
    alpha=64,
    targets=SEVEN_PROJECTIONS,
    batch=4,
    accumulation=8,
)

ARTICLE_001 = Recipe(
    name="article-001",
    source="article 001, 50,000 support dialogues on 4 A100: NF4, r 8, alpha 32, attention; rate, batch ours; no fp16",
    when="repeating that article: dialogue style on an NF4 base. Its alpha is four times the rank, others' is twice",
    method="qlora",
    rank=8,
    alpha=32,
    targets=ATTENTION,
)

ARTICLE_003 = Recipe(
    name="article-003",
    source="article 003, guide on Llama-3.1-8B: r 16, alpha 32, all linears, cosine, 0.03, 4 x 4, 2048 tokens",
    when="repeating that article, or long conversations of up to 2,048 tokens",
    batch=4,
    accumulation=4,
    max_length=2048,
)

ARTICLE_004 = Recipe(
    name="article-004",
    source="article 004, its recipes: r 16, alpha 32, dropout 0.1, 7 projections, 4 x 4, 2e-4, warm-up 0.1; no fp16",
    when="repeating that article; its heavier dropout and longer warm-up suit small, uneven data",
    dropout=0.1,
    targets=SEVEN_PROJECTIONS,
    warmup=0.1,
    batch=4,
    accumulation=4,
)

QLORA_SMALL_GPU = Recipe(
    name="qlora-small-gpu",
    source="articles 001 and 003 on QLoRA: NF4 with double quantization, checkpointing required; batch 1 x 16 is ours",
    when="a base that fits in memory only in four bits: 7B on 8 to 12 GB. Slower than LoRA, so not where LoRA fits",
    method="qlora",
    batch=1,
    accumulation=16,
    gradient_checkpointing=True,
)

CLASSIFICATION = Recipe(
    name="classification",
    source="article 000's sentiment task and article 002 (schema and labels need little rank); short rows are ours",
    when="one label or a few words as the answer, thousands of short texts: small rank, large batch, 2 passes",
    rank=8,
    alpha=16,
    epochs=2.0,
    batch=32,
    max_length=512,
)

GENERATION = Recipe(
    name="generation",
    source="article 000: r 32 to 64 come within a point of full on policies and summaries; 4 x 4 of article 003",
    when="long answers: documents, code, JSON, summaries",
    rank=64,
    alpha=128,
    batch=4,
    accumulation=4,
    max_length=2048,
)

LOW_DATA = Recipe(
    name="low-data",
    source="article 002: unstable at 1e-4, so 3e-5 to 1e-4 and at most 3 passes; article 004's dropout",
    when="fewer than about 1,000 examples, after prompts were tried; more is held out, since the loss decides",
    rank=8,
    alpha=16,
    dropout=0.1,
    learning_rate=1e-4,
    warmup=0.1,
    batch=4,
    hold_out=0.1,
)

DEMO = Recipe(
    name="demo",
    source="measured here: SmolLM2-135M on two CPU cores",
    when="one to two minutes a task on a laptop: one pass, a higher rate to make up for the few steps",
    dropout=0.0,
    learning_rate=1e-3,
    warmup=0.05,
    epochs=1.0,
    max_length=224,
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        RECOMMENDED,
        CONSERVATIVE,
        AGGRESSIVE,
        CLASSIFICATION,
        GENERATION,
        LOW_DATA,
        QLORA_SMALL_GPU,
        ARTICLE_000,
        ARTICLE_001,
        ARTICLE_003,
        ARTICLE_004,
        DEMO,
    )
}


def named_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises `UnknownRecipe`, listing those there are."""
    try:
        return RECIPES[name]
    except KeyError:
        raise UnknownRecipe(f"no recipe is called {name!r}; there are: {', '.join(RECIPES)}") from None

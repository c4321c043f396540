"""Scores that somebody else reported: a table of figures with its source, in the recipe or in a file beside it."""

from __future__ import annotations

from evals.scores import Score
from merge.recipe_evals import Reported


def reported_scores(table: Reported) -> tuple[Score, ...]:
    """The figures of a table as they were reported; nothing of them was measured here."""
    return tuple(
        Score(
            title=row.dataset,
            metric=row.metric,
            metric_name=row.metric_name,
            value=row.value,
            origin="reported",
            dataset=row.type,
            config=row.config,
            split=row.split,
            shots=row.num_few_shot,
            harness=table.harness,
            date=table.date,
            source_name=table.source.name,
            source_url=table.source.url,
            details_url=table.details,
        )
        for row in table.results
    )

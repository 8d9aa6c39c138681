-- Mean gap and entropy of the student by domain, and the gap that nine tenths of the tokens stay below, to 0.001 nats.
-- example: lightopd sql CACHE gap_by_domain
WITH places AS (
    SELECT
        signal,
        domain,
        unnest(range(len(loss_mask))) AS pos,
        list_position(loss_mask, true) - 1 AS first_trained,
        loss_mask,
        logprobs,
        signal_logprobs,
        entropies
    FROM raw_pairs
),
-- Counted by thousandths of a nat: as many rows as gaps differ, however many tokens there are.
bins AS (
    SELECT
        signal,
        domain,
        try_cast(1000 * gap AS INTEGER) AS bin,
        count(*) AS tokens,
        count(*) FILTER (pos = first_trained) AS rollouts,
        sum(gap) AS gap,
        sum(entropy) AS entropy,
        count(entropy) AS entropies
    FROM (
        SELECT *, logprobs[pos + 1] - signal_logprobs[pos + 1] AS gap, entropies[pos + 1] AS entropy
        FROM places
        WHERE loss_mask[pos + 1]
    )
    WHERE gap IS NOT NULL
    GROUP BY ALL
),
ordered AS (
    SELECT *, sum(tokens) OVER (PARTITION BY signal, domain ORDER BY bin) AS up_to,
        sum(tokens) OVER (PARTITION BY signal, domain) AS total
    FROM (SELECT * REPLACE (coalesce(domain, 'none') AS domain) FROM bins)
)
SELECT
    signal,
    domain,
    sum(rollouts)::BIGINT AS rollouts,
    sum(tokens)::BIGINT AS tokens,
    round(sum(gap) / sum(tokens), 4) AS mean_gap,
    round(min(bin) FILTER (up_to >= 0.9 * total) / 1000, 3) AS p90_gap,
    round(sum(entropy) / sum(entropies), 4) AS mean_entropy
FROM ordered
GROUP BY signal, domain
ORDER BY mean_gap DESC, domain;

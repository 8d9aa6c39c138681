-- Probability that each signal leaves outside its stored top-k: large values call for a larger top_k.
-- example: lightopd sql CACHE tail_mass
-- Counted by hundred-thousandths, what the shares below are told in: as many rows, however many tokens there are.
WITH bins AS (
    SELECT
        signal,
        (100_000 * tail)::INTEGER AS bin,
        count(*) AS tokens,
        sum(topk_count) AS entries,
        sum(tail) AS tail,
        count(*) FILTER (tail > 0.1) AS above
    FROM (SELECT signal, topk_count, exp(logprob_tail) AS tail FROM tokens WHERE logprob_tail IS NOT NULL)
    GROUP BY ALL
),
ordered AS (
    SELECT *, sum(tokens) OVER (PARTITION BY signal ORDER BY bin) AS up_to,
        sum(tokens) OVER (PARTITION BY signal) AS total
    FROM bins
)
SELECT
    signal,
    sum(tokens)::BIGINT AS tokens,
    round(sum(entries) / sum(tokens), 1) AS mean_entries,
    round(sum(tail) / sum(tokens), 5) AS mean_tail,
    round(min(bin) FILTER (up_to >= 0.5 * total) / 100_000, 5) AS median_tail,
    round(min(bin) FILTER (up_to >= 0.9 * total) / 100_000, 5) AS p90_tail,
    round(min(bin) FILTER (up_to >= 0.99 * total) / 100_000, 5) AS p99_tail,
    round(sum(above) / sum(tokens), 4) AS share_above_10_percent
FROM ordered
GROUP BY signal
ORDER BY signal;

-- Probability that each signal leaves outside its stored top-k: large values call for a larger top_k.
-- example: lightopd sql CACHE tail_mass
SELECT
    signal,
    count(*) AS tokens,
    round(avg(topk_count), 1) AS mean_entries,
    round(avg(exp(logprob_tail)), 5) AS mean_tail,
    round(quantile_cont(exp(logprob_tail), 0.5), 5) AS median_tail,
    round(quantile_cont(exp(logprob_tail), 0.9), 5) AS p90_tail,
    round(quantile_cont(exp(logprob_tail), 0.99), 5) AS p99_tail,
    round(avg((exp(logprob_tail) > 0.1)::INTEGER), 4) AS share_above_10_percent
FROM tokens
WHERE logprob_tail IS NOT NULL
GROUP BY signal
ORDER BY signal;

-- How far each run moved from the cache, step by step, beside the gap that it began with; name runs with --run.
-- every = 1: only each so many-th step
-- example: lightopd sql CACHE drift --run RUN every=10
WITH gaps AS (
    SELECT signal, avg(gap) AS cache_gap FROM tokens WHERE loss_mask AND gap IS NOT NULL GROUP BY signal
)
SELECT
    m.run,
    m.step,
    round(max(value) FILTER (name = 'loss'), 4) AS loss,
    round(-max(value) FILTER (name = 'log_ratio'), 4) AS gap_now,
    round((SELECT avg(cache_gap) FROM gaps), 4) AS gap_at_rollout,
    round(max(value) FILTER (name = 'w_mean'), 4) AS w_mean,
    round(max(value) FILTER (name = 'ess'), 4) AS ess,
    round(max(value) FILTER (name = 'overlap'), 4) AS overlap,
    round(max(value) FILTER (name = 'chi2'), 4) AS chi2,
    round(max(value) FILTER (name = 'chi2_error'), 4) AS chi2_error,
    round(max(value) FILTER (name = 'log_ratio_lost'), 4) AS log_ratio_lost,
    max(value) FILTER (name = 'stale') AS stale
FROM metrics AS m
WHERE m.step % $every = 0
GROUP BY m.run, m.step
ORDER BY m.run, m.step;

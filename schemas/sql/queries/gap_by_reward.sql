-- Mean gap of rollouts by their reward: a teacher that explains failures has a larger gap where the reward is low.
-- bins = 5: bins between the least and the largest reward
-- example: lightopd sql CACHE gap_by_reward bins=10
WITH limits AS (SELECT min(reward) AS low, max(reward) AS high FROM rollouts)
SELECT
    signal,
    round(least(floor((reward - low) / nullif(high - low, 0) * $bins), $bins - 1) / $bins * (high - low) + low, 4)
        AS reward_from,
    count(DISTINCT rollout_id) AS rollouts,
    count(*) AS tokens,
    round(avg(gap), 4) AS mean_gap,
    round(max(gap)::DOUBLE, 4) AS max_gap
FROM tokens, limits
WHERE loss_mask AND gap IS NOT NULL AND reward IS NOT NULL
GROUP BY ALL
ORDER BY signal, reward_from;

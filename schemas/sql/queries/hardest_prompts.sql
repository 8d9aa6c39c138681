-- Prompts with the lowest mean reward, and the gap of their rollouts.
-- k = 20: how many
-- example: lightopd sql CACHE hardest_prompts k=5
SELECT
    prompt_id,
    count(*) AS samples,
    round(avg(reward), 4) AS mean_reward,
    round(avg(truncated::INTEGER), 4) AS truncated_share,
    round(avg(g.gap), 4) AS mean_gap,
    decode(any_value(prompt_ids)[1:60]) AS prompt_begins_with
FROM rollouts
LEFT JOIN (
    SELECT rollout_id, avg(gap) AS gap FROM tokens WHERE loss_mask GROUP BY rollout_id
) AS g USING (rollout_id)
WHERE reward IS NOT NULL
GROUP BY prompt_id
ORDER BY mean_reward, mean_gap DESC, prompt_id
LIMIT $k;

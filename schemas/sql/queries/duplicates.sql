-- Responses that one prompt got more than once: they add weight and no information.
-- k = 50: how many, the most frequent first
-- example: lightopd sql CACHE duplicates k=10
SELECT
    prompt_id,
    count(*) AS copies,
    any_value(response_tokens) AS response_tokens,
    round(avg(reward), 4) AS mean_reward,
    decode(any_value(response_ids)[1:40]) AS begins_with
FROM rollouts
GROUP BY prompt_id, response_ids
HAVING count(*) > 1
ORDER BY copies DESC, prompt_id
LIMIT $k;

-- Prompts by how many of their samples pass: the shape of the difficulty that a student sees.
-- passing = 1.0: least reward that counts as a pass
-- example: lightopd sql CACHE pass_rate passing=0.5
SELECT
    samples,
    passes,
    round(passes / samples, 4) AS pass_rate,
    count(*) AS prompts,
    round(count(*) / sum(count(*)) OVER (), 4) AS share
FROM (
    SELECT prompt_id, count(*) AS samples, count(*) FILTER (reward >= $passing) AS passes
    FROM rollouts WHERE reward IS NOT NULL GROUP BY prompt_id
)
GROUP BY samples, passes
ORDER BY samples, passes;

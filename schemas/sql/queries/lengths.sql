-- Response lengths in tokens by domain and finish reason.
-- example: lightopd sql CACHE lengths
SELECT
    coalesce(domain, 'none') AS domain,
    finish_reason,
    count(*) AS rollouts,
    min(response_tokens) AS shortest,
    quantile_disc(response_tokens, 0.1) AS p10,
    quantile_disc(response_tokens, 0.5) AS median,
    quantile_disc(response_tokens, 0.9) AS p90,
    max(response_tokens) AS longest,
    round(avg(response_tokens), 1) AS mean,
    round(avg(prompt_tokens), 1) AS mean_prompt
FROM rollouts
GROUP BY ALL
ORDER BY ALL;

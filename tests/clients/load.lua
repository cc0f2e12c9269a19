-- Load for wrk: streamed completions of several lengths. Ends with 1 if any of them failed, and says what came.
local number = 0

request = function()
    number = number + 1
    local body = string.format(
        '{"prompt": "Request %d", "max_tokens": %d, "temperature": 0, "ignore_eos": true, "stream": true, ' ..
        '"stream_options": {"include_usage": true}}', number, 8 + number % 32)
    return wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, body)
end

local thread_list = {}
setup = function(thread) table.insert(thread_list, thread) end

init = function() whole, cut = 0, 0 end

response = function(status, headers, body)
    if status == 200 and body:sub(-14) == "data: [DONE]\n\n" then whole = whole + 1 else cut = cut + 1 end
end

done = function(summary, latency)
    local whole, cut = 0, 0
    for _, thread in ipairs(thread_list) do
        whole, cut = whole + thread:get("whole"), cut + thread:get("cut")
    end
    local errors = summary.errors
    local failed = cut + errors.connect + errors.read + errors.write + errors.status + errors.timeout
    print(string.format("%d answers whole, %d failed, %.1f/s, p50 %.0f ms, p99 %.0f ms", whole, failed,
        whole / summary.duration * 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
    if failed > 0 or whole == 0 then os.exit(1) end
end

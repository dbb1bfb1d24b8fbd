-- The first request of each connection, looked at before HAProxy parses it. What HAProxy cannot parse it answers with a
-- page of HTML that no setting changes; here the same is refused with our own answers.
--
-- Loaded with two arguments: the folder of the answers (400.http, 408.http and 431.http), and from how many bytes on
-- the head of a request is too long.

local folder, max_head_bytes = ...
local TOKEN = "[%w!#$%%&'*+.^_`|~-]+"
local MAX_HEADERS = 100 -- tune.http.maxhdr, which counts one more

local function answer_of(status)
    local file = assert(io.open(folder .. "/" .. status .. ".http", "rb"))
    local text = file:read("a")
    file:close()
    return (text:gsub("\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1))
end

local ANSWERS = { [400] = answer_of(400), [408] = answer_of(408), [431] = answer_of(431) }

-- The lines of a request's head, without their ends, and folded ones joined; nil where one is malformed.
local function lines_of(head)
    local lines = {}
    for line in head:gmatch("([^\n]*)\n") do
        line = line:gsub("\r$", "")
        if line:find("[%z\r]") then
            return nil
        end
        if line:find("^[ \t]") then
            if #lines < 2 then
                return nil
            end
            lines[#lines] = lines[#lines] .. " " .. line
        else
            lines[#lines + 1] = line
        end
    end
    return lines
end

local function are_equal(values)
    for i = 2, #values do
        if values[i] ~= values[1] then
            return false
        end
    end
    return true
end

-- A host as it is compared: in small letters, without a port that its scheme implies.
local function host_of(authority)
    return (authority:lower():gsub("^[^@]*@", ""):gsub(":80$", ""):gsub(":443$", ""))
end

local function has_length(value, lengths)
    for length in (value .. ","):gmatch("[ \t]*(.-)[ \t]*,") do
        if not length:find("^%d+$") or #length > 18 then
            return false
        end
        lengths[#lengths + 1] = length
    end
    return true
end

-- Chunked, once, and nothing else; of other codings the ingress says what is wrong, where HAProxy lets them through.
local function is_chunked(codings)
    return #codings == 0 or (#codings == 1 and codings[1] == "chunked")
end

-- The status to refuse the request of that head with; nil for one that HAProxy can parse.
local function refusal(head)
    local lines = lines_of(head)
    if lines == nil or #lines == 0 then
        return 400
    end
    if #lines - 1 > MAX_HEADERS then
        return 431
    end
    local target = lines[1]:match("^" .. TOKEN .. " +([\33-\126]+) +HTTP/1%.%d$")
    if target == nil then
        return 400
    end
    local lengths, hosts, codings = {}, {}, {}
    for i = 2, #lines do
        local name, value = lines[i]:match("^(" .. TOKEN .. "):[ \t]*(.-)[ \t]*$")
        if name == nil then
            return 400
        end
        name = name:lower()
        if name == "content-length" and not has_length(value, lengths) then
            return 400
        elseif name == "host" then
            if value:find("[%s/?#@\\]") then
                return 400
            end
            hosts[#hosts + 1] = host_of(value)
        elseif name == "transfer-encoding" then
            codings[#codings + 1] = value:lower()
        elseif name == "upgrade" and value:lower():find("websocket", 1, true) then
            return 400
        end
    end
    local authority = target:match("^%a[%w+.-]*://([^/?#]*)")
    if authority ~= nil and #hosts > 0 then
        hosts[#hosts + 1] = host_of(authority)
    end
    if not (are_equal(lengths) and are_equal(hosts) and is_chunked(codings)) then
        return 400
    end
    return nil
end

-- What came of a request: its whole head, or as much of it as is read. Waits for it, as long as `inspect-delay` says.
local function first_bytes(channel)
    while true do
        local data = channel:data() or ""
        local is_whole = data:find("[^\r\n]\r?\n\r?\n") or data:find("^[\r\n]*[^\r\n%w]")
        if is_whole or #data >= tonumber(max_head_bytes) then
            return data
        end
        local longer = channel:data(0, #data + 1)
        if longer == nil or #longer <= #data then
            return data
        end
    end
end

core.register_action("check_request", { "tcp-req" }, function(txn)
    local data = first_bytes(txn.req):gsub("^[\r\n]+", "")
    local stop = data:find("\n\r?\n")
    local status
    if stop ~= nil then
        status = refusal(data:sub(1, stop))
    elseif #data >= tonumber(max_head_bytes) then
        status = 431
    else
        status = data:find("^%w") and 408 or 400
    end
    if status ~= nil then
        txn:set_var("txn.refused", status)
    end
end)

core.register_service("refuse", "tcp", function(applet)
    applet:send(ANSWERS[applet:get_var("txn.refused")] or ANSWERS[400])
end)

"""The directory's Lua scripts, run inside Redis: what has to be one round trip, or nothing in between."""

from __future__ import annotations

# ARGV: prefix, "1" for leading runs alone, number of arena ids or -1 for all, arena ids, all hashes in one string:
# an argument each would cost both sides more than the look-up itself.
# Answers id, record, "slot,slot,,slot" for each living arena. Stops where no arena holds the next block.
LOCATE = """
local prefix, leading, count = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3])
local ids = {}
if count < 0 then
  ids, count = redis.call('SMEMBERS', prefix .. 'arenas'), 0
else
  for i = 1, count do ids[i] = ARGV[3 + i] end
end
local hashes = ARGV[4 + count]
local total = #hashes / 16
local arenas, answer = {}, {}
for _, id in ipairs(ids) do
  local record = redis.call('GET', prefix .. 'arena:' .. id)
  if record then
    arenas[#arenas + 1] = {id = id, record = record, key = prefix .. 'arena:' .. id .. ':blocks', run = {}, open = true}
  end
end
local first, goes_on = 1, true
while goes_on and first <= total do
  local last, names, covered = math.min(first + 255, total), {}, {}
  for i = first, last do names[i - first + 1] = string.sub(hashes, 16 * i - 15, 16 * i) end
  for _, arena in ipairs(arenas) do
    if arena.open then
      for i, slot in ipairs(redis.call('HMGET', arena.key, unpack(names))) do
        if slot then covered[i] = true end
        if leading and not slot then arena.open = false break end
        arena.run[#arena.run + 1] = slot or ''
      end
    end
  end
  for i = 1, last - first + 1 do goes_on = goes_on and covered[i] end
  first = last + 1
end
for _, arena in ipairs(arenas) do
  answer[#answer + 1], answer[#answer + 2] = arena.id, arena.record
  answer[#answer + 1] = table.concat(arena.run, ',')
end
return answer
"""

# KEYS: record, inventory, set of ids. ARGV: id, record, time to live in ms, marker.
BEAT = """
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[3], ARGV[1])
if redis.call('HEXISTS', KEYS[2], ARGV[4]) == 0 then return 0 end
return redis.call('PEXPIRE', KEYS[2], ARGV[3])
"""

# KEYS: inventory. ARGV: marker, number of hashes to drop, these, then hash and slot of each block to add.
UPDATE = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
local drops = tonumber(ARGV[2])
for i = 3, 2 + drops do redis.call('HDEL', KEYS[1], ARGV[i]) end
for i = 3 + drops, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
"""

"""The directory's Lua scripts, run inside Redis: what has to be one round trip, or nothing in between.

All arenas share one hash, `<prefix>blocks`, so that a look-up costs one field for each block, however many arenas there
are. Its fields, all integers big-endian:

    16 bytes, a block's name   2 bytes: number of holders; 4 for each: its inventory, rising; 4 for each: its slot there
    "arena:<id>"               the 4 bytes of that arena's inventory; a "?" before them until all of it is announced
    "last"                     the highest inventory so far

An inventory is a number that is never used again, so what bears the number of an arena that died, or has announced all
once more, counts for nothing at once; `SWEEP` clears it away bit by bit. The highest bit of a holder says that its
store has the block on disk (`ON_DISK` for a slot says so too): who counts blocks need not look at slots.
"""

from __future__ import annotations

STEP_BLOCKS = 256  # looked up at a time; fewer at first, because many prompts are new

# The living arenas, and the values of some blocks. ARGV: prefix, all hashes in one string: an argument each would cost
# both sides more than the look-up itself.
_LOOK_UP = f"""
local prefix, hashes = ARGV[1], ARGV[2]
local blocks, total = prefix .. 'blocks', #hashes / 16
local sub, arenas, ids = string.sub, {{}}, redis.call('SMEMBERS', prefix .. 'arenas')
if #ids > 0 then
  local keys, fields = {{}}, {{}}
  for i, id in ipairs(ids) do
    fields[i] = 'arena:' .. id
    keys[i] = prefix .. fields[i]
  end
  local records, numbers = redis.call('MGET', unpack(keys)), redis.call('HMGET', blocks, unpack(fields))
  for i = 1, #ids do
    if records[i] and numbers[i] and #numbers[i] == 4 then
      arenas[#arenas + 1] = {{record = records[i], number = numbers[i], num_disk = 0}}
    end
  end
end
local at = 0
local function next_values()
  local names, last = {{}}, math.min(total, at == 0 and {STEP_BLOCKS // 4} or at + {STEP_BLOCKS})
  for i = at + 1, last do names[i - at] = sub(hashes, 16 * i - 15, 16 * i) end
  return redis.call('HMGET', blocks, unpack(names))
end
"""

# Answers of each living arena that holds the first block: length of its leading run (4 bytes), how many of these blocks
# are on disk (4), length of its record (4), its record; all in one string. As neighbours have the same holders mostly,
# these are looked at only where they change.
COUNT = (
    _LOOK_UP
    + """
local function places(holders)
  local found = {}
  for i = 3, #(holders or ''), 4 do
    local number = string.sub(holders, i, i + 3)
    local top = string.byte(number)
    if top < 128 then
      found[number] = 'memory'
    else
      found[string.char(top - 128) .. string.sub(number, 2)] = 'disk'
    end
  end
  return found
end
local open, holders, on_disk = arenas, nil, {}
while #open > 0 and at < total do
  for _, value in ipairs(next_values()) do
    local these = value and sub(value, 1, #value / 2 + 1)
    if these ~= holders then
      holders = these
      local found, still = places(these), {}
      on_disk = {}
      for _, arena in ipairs(open) do
        local place = found[arena.number]
        if place then still[#still + 1] = arena else arena.run = at end
        if place == 'disk' then on_disk[#on_disk + 1] = arena end
      end
      open = still
      if #open == 0 then break end
    end
    for _, arena in ipairs(on_disk) do arena.num_disk = arena.num_disk + 1 end
    at = at + 1
  end
end
local answer = {}
for _, arena in ipairs(arenas) do
  local run = arena.run or at
  if run > 0 then
    answer[#answer + 1] = struct.pack('>I4I4I4', run, arena.num_disk, #arena.record) .. arena.record
  end
end
return table.concat(answer)
"""
)

# Answers of each living arena: its inventory (4 bytes), length of its record (4), its record; all in one string. And
# the values of the leading blocks that anybody holds, in another.
LOCATE = (
    _LOOK_UP
    + """
local values, goes_on = {}, #arenas > 0
while goes_on and at < total do
  local found = next_values()
  local count = 0
  while count < #found and found[count + 1] do count = count + 1 end
  values[#values + 1] = table.concat(found, '', 1, count)
  goes_on, at = count == #found, at + count
end
local answer = {}
for _, arena in ipairs(arenas) do
  answer[#answer + 1] = arena.number .. struct.pack('>I4', #arena.record) .. arena.record
end
return {table.concat(answer), table.concat(values)}
"""
)

_HEAD = """
if redis.replicate_commands then redis.replicate_commands() end  -- Redis before 7 asks for it
local prefix = ARGV[1]
local blocks = prefix .. 'blocks'
local function keep(ttl_ms)  -- as long as the one who lives longest says
  if redis.call('PTTL', blocks) < tonumber(ttl_ms) then redis.call('PEXPIRE', blocks, ttl_ms) end
end
"""

# ARGV: prefix, id, record, time to live in ms. Answers 1 where the arena's inventory is there and complete. One whose
# record was forgotten is another arena for all who look: it has to announce everything again.
BEAT = (
    _HEAD
    + """
local id, field, arenas = ARGV[2], 'arena:' .. ARGV[2], prefix .. 'arenas'
if redis.call('EXISTS', prefix .. field) == 0 or redis.call('SISMEMBER', arenas, id) == 0 then
  redis.call('HDEL', blocks, field)
end
redis.call('SET', prefix .. field, ARGV[3], 'PX', ARGV[4])
redis.call('SADD', arenas, id)
keep(ARGV[4])
return redis.call('HSTRLEN', blocks, field) == 4 and 1 or 0
"""
)

# ARGV: prefix, id, time to live in ms. Begins a new inventory.
BEGIN = (
    _HEAD
    + """
redis.call('HSET', blocks, 'arena:' .. ARGV[2], '?' .. struct.pack('>I4', redis.call('HINCRBY', blocks, 'last', 1)))
keep(ARGV[3])
"""
)

# ARGV: prefix, id, "?" while all is being announced, hashes that go, hashes that come with 4 bytes of slot behind each;
# then, if this completes the inventory, a time to live in ms. Answers 0 where there is no such inventory.
UPDATE = (
    _HEAD
    + """
local field, gone, came = 'arena:' .. ARGV[2], ARGV[4], ARGV[5]
local marker = redis.call('HGET', blocks, field) or ''
local number = string.sub(marker, -4)
if marker ~= ARGV[3] .. number or #number ~= 4 then return 0 end
local own = struct.unpack('>I4', number)
local on_disk = struct.pack('>I4', own + 2147483648)
local function updated(value, slot)
  local mine = slot and (slot == '\\255\\255\\255\\255' and on_disk or number)
  local first = string.sub(value, 3, 6)
  if #value == 2 or #value == 10 and (first == number or first == on_disk) then  -- nobody else has it
    return mine and '\\0\\1' .. mine .. slot
  end
  local numbers, slots, half = {}, {}, (#value - 2) / 2
  for i = 3, half + 2, 4 do
    local other = struct.unpack('>I4', value, i) % 2147483648
    if mine and other >= own then
      numbers[#numbers + 1], slots[#slots + 1], mine = mine, slot, nil
    end
    if other ~= own then
      numbers[#numbers + 1], slots[#slots + 1] = string.sub(value, i, i + 3), string.sub(value, i + half, i + half + 3)
    end
  end
  if mine then numbers[#numbers + 1], slots[#slots + 1] = mine, slot end
  return #numbers > 0 and struct.pack('>I2', #numbers) .. table.concat(numbers) .. table.concat(slots)
end
local names, places = {}, {}
for i = 1, #gone, 16 do names[#names + 1] = string.sub(gone, i, i + 15) end
for i = 1, #came, 20 do
  names[#names + 1] = string.sub(came, i, i + 15)
  places[#names] = string.sub(came, i + 16, i + 19)
end
for first = 1, #names, 1000 do
  local last, sets, drops = math.min(first + 999, #names), {}, {}
  for i, old in ipairs(redis.call('HMGET', blocks, unpack(names, first, last))) do
    local name = names[first + i - 1]
    local is_whole = old and #old % 8 == 2  -- what is not is nobody's
    local new = updated(is_whole and old or '\\0\\0', places[first + i - 1])
    if new then
      sets[#sets + 1], sets[#sets + 2] = name, new
    elseif old then
      drops[#drops + 1] = name
    end
  end
  if #drops > 0 then redis.call('HDEL', blocks, unpack(drops)) end
  if #sets > 0 then redis.call('HSET', blocks, unpack(sets)) end
end
if ARGV[6] then
  redis.call('HSET', blocks, field, number)
  keep(ARGV[6])
end
return 1
"""
)

# ARGV: prefix, where the last sweep stopped, how many fields to look at. Takes away inventories of nobody who lives.
# Answers where it stopped.
SWEEP = (
    _HEAD
    + """
local fields, living = {}, {}
for _, id in ipairs(redis.call('SMEMBERS', prefix .. 'arenas')) do
  local field = 'arena:' .. id
  local marker = redis.call('EXISTS', prefix .. field) == 1 and redis.call('HGET', blocks, field)
  if marker then fields[field], living[string.sub(marker, -4)] = true, true end
end
local function swept(value)
  local numbers, slots, half = {}, {}, (#value - 2) / 2
  for i = 3, half + 2, 4 do
    local number = string.sub(value, i, i + 3)
    if living[struct.pack('>I4', struct.unpack('>I4', number) % 2147483648)] then
      numbers[#numbers + 1], slots[#slots + 1] = number, string.sub(value, i + half, i + half + 3)
    end
  end
  return #numbers > 0 and struct.pack('>I2', #numbers) .. table.concat(numbers) .. table.concat(slots)
end
local scanned = redis.call('HSCAN', blocks, ARGV[2], 'COUNT', ARGV[3])
for i = 1, #scanned[2], 2 do
  local field, value = scanned[2][i], scanned[2][i + 1]
  local new = value
  if #field == 16 then
    new = #value % 8 == 2 and swept(value)
  elseif string.sub(field, 1, 6) == 'arena:' then
    new = fields[field] and value
  end
  if not new then
    redis.call('HDEL', blocks, field)
  elseif new ~= value then
    redis.call('HSET', blocks, field, new)
  end
end
return scanned[1]
"""
)

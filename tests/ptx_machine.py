"""Runs PTX on the CPU: all threads of a launch side by side, each register an array over them.

What NVVM makes of our kernels is what a device would be given. Here that very text is executed, instruction
by instruction as the PTX manual defines them, so that its integers and its correctly rounded arithmetic can
be compared with the CPU's, bit for bit. Threads part at branches; those furthest behind go on first, until
they meet the others again. Instructions that leave the result open (fused or approximate ones) are refused.
"""

import re
import struct

import numpy as np

INSTRUCTION = re.compile(r"^(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);$", re.DOTALL)
REGISTER = re.compile(r"^%(p|rs|rd|r|fd|f)(\d+)$")
SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x")
OF_REGISTER = {
    "p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64, "f": np.float32, "fd": np.float64,
}  # fmt: skip
TYPES = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in (("u", "u"), ("b", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
} | {"f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?")}
WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
DONE = 2**60


class Machine:
    """A kernel. `entry`: its name. `counts`: how often each opcode was executed, by threads of any number."""

    def __init__(self, text):
        self.text = text
        self.entry = re.search(r"\.visible \.entry (\w+)\(", text).group(1)
        head, body = text.split(".visible .entry", 1)[1].split("{", 1)
        self.parameters = re.findall(r"\.param \.(\w+) (\w+)", head)
        self.labels, self.code = {}, []
        body = re.sub(r"//[^\n]*", "", body[: body.rindex("}")])
        for found in re.findall(r"\$\w+:|[^;]+;", body):
            statement = found.strip(" \n\t{}")
            while label := re.match(r"^(\$\w+):\s*", statement):
                self.labels[label.group(1)] = len(self.code)
                statement = statement[label.end() :].lstrip(" \n\t{")
            if statement and not statement.startswith("."):
                self.code.append(_parsed(statement))
        self.counts = {}

    def run(self, memory, base, blocks, threads, arguments, first_block=0, grid=None):
        """Run a launch on memory (uint8), which lies at an address; or some blocks of a larger grid."""
        if len(arguments) != len(self.parameters):
            raise AssertionError(f"{len(arguments)} arguments for {len(self.parameters)} parameters")
        params = {}
        for (kind, name), value in zip(self.parameters, arguments, strict=True):
            if value.dtype.itemsize != TYPES[kind].itemsize:
                raise AssertionError(f"{name} is {kind}, not {value.dtype}")
            params[name] = value
        with np.errstate(all="ignore"):
            _Launch(self, memory, base, blocks, threads, params, first_block, grid or blocks).run()


def _parsed(statement):
    found = INSTRUCTION.match(statement)
    if found is None:
        raise NotImplementedError(statement)
    negated, predicate, opcode, rest = found.groups()
    operands = [part.strip() for part in rest.split(",")] if rest else []
    return bool(negated), predicate, opcode.split("."), operands


class _Launch:
    def __init__(self, machine, memory, base, blocks, threads, params, first_block, grid):
        self.machine, self.memory, self.base, self.params = machine, memory, base, params
        count = blocks * threads
        self.registers = {}
        thread = np.arange(count, dtype=np.uint32)
        self.special = {
            "%tid.x": thread % threads,
            "%ctaid.x": thread // threads + np.uint32(first_block),
            "%ntid.x": np.full(count, threads, np.uint32),
            "%nctaid.x": np.full(count, grid, np.uint32),
        }
        self.count = count
        self.at = np.zeros(count, np.int64)
        self.who = None

    def run(self):
        code = self.machine.code
        while True:
            place = int(self.at.min())
            if place >= len(code):
                return
            here = self.at == place
            self.who = np.flatnonzero(here)
            others = self.at[~here]
            meet = int(others.min()) if others.size else DONE
            while place < len(code) and place < meet:
                place = self.step(place)
                if place < 0:
                    break
            if place >= 0:
                self.at[self.who] = place

    def step(self, place):
        """Execute an instruction for the threads at hand; return the next place, -1 if they part."""
        negated, predicate, opcode, operands = self.machine.code[place]
        counts = self.machine.counts
        counts[opcode[0]] = counts.get(opcode[0], 0) + 1
        everyone = self.who
        if predicate is not None:
            holds = self.registers[predicate][everyone] != negated
            if opcode[0] in ("bra", "ret"):
                target = self.machine.labels[operands[0]] if opcode[0] == "bra" else DONE
                self.at[everyone] = np.where(holds, target, place + 1)
                return -1
            self.who = everyone[holds]
        elif opcode[0] == "bra":
            self.at[everyone] = self.machine.labels[operands[0]]
            return -1
        elif opcode[0] == "ret":
            self.at[everyone] = DONE
            return -1
        if self.who.size:
            getattr(self, f"do_{opcode[0]}")(opcode[1:], operands)
        self.who = everyone
        return place + 1

    # -- operands ------------------------------------------------------------------------------------

    def get(self, operand, kind):
        """Return an operand as an array of a type (a name or a dtype)."""
        dtype = TYPES[kind] if isinstance(kind, str) else kind
        if operand in SPECIAL:
            return self.special[operand][self.who].astype(dtype)
        if operand.startswith("%"):
            return _as(self.registers[operand][self.who], dtype)
        if operand.startswith(("0f", "0F")):
            return np.full(self.who.size, struct.unpack(">f", bytes.fromhex(operand[2:]))[0], np.float32)
        if operand.startswith(("0d", "0D")):
            return np.full(self.who.size, struct.unpack(">d", bytes.fromhex(operand[2:]))[0], np.float64)
        bits = dtype.itemsize * 8
        if dtype.kind == "b":
            return np.full(self.who.size, bool(int(operand)))
        return np.full(self.who.size, int(operand, 0) % 2**bits, f"u{dtype.itemsize}").view(dtype)

    def put(self, operand, value):
        found = REGISTER.match(operand)
        if found is None:
            raise NotImplementedError(f"result in {operand}")
        dtype = np.dtype(OF_REGISTER[found.group(1)])
        register = self.registers.get(operand)
        if register is None:
            register = self.registers[operand] = np.zeros(self.count, dtype)
        register[self.who] = _as(value, dtype)

    def address(self, operand):
        name, _, offset = operand.strip("[]").partition("+")
        where = self.get(name, "u64") + np.uint64(int(offset or 0) % 2**64)
        return (where - np.uint64(self.base)).astype(np.int64)

    def places(self, operand, dtype):
        """Return the indices of items in the memory seen as an array of a dtype."""
        at = self.address(operand)
        if ((at < 0) | (at + dtype.itemsize > self.memory.size) | (at % dtype.itemsize != 0)).any():
            raise IndexError("an illegal memory access was encountered")
        return at // dtype.itemsize

    # -- memory --------------------------------------------------------------------------------------

    def do_ld(self, kinds, operands):
        dtype = TYPES[kinds[-1]]
        if kinds[0] == "param":
            value = np.asarray(self.params[operands[1].strip("[]")]).reshape(1).view(dtype)
            self.put(operands[0], np.repeat(value, self.who.size))
            return
        if "global" not in kinds or any(kind.startswith("v") and kind[1:].isdigit() for kind in kinds):
            raise NotImplementedError(f"ld.{'.'.join(kinds)}")
        self.put(operands[0], self.memory.view(dtype)[self.places(operands[1], dtype)])

    def do_st(self, kinds, operands):
        if kinds[0] != "global" or len(kinds) != 2:
            raise NotImplementedError(f"st.{'.'.join(kinds)}")
        dtype = TYPES[kinds[-1]]
        self.memory.view(dtype)[self.places(operands[0], dtype)] = self.get(operands[1], dtype)

    def do_atom(self, kinds, operands):
        # Nobody looks at the old value; if somebody does, its register is not there.
        self.do_red(kinds, operands[1:])

    def do_red(self, kinds, operands):
        dtype = TYPES[kinds[-1]]
        add = {"add": np.add, "min": np.minimum, "max": np.maximum}[kinds[-2]]
        add.at(self.memory.view(dtype), self.places(operands[0], dtype), self.get(operands[1], dtype))

    def do_cvta(self, _, operands):
        self.put(operands[0], self.get(operands[1], "u64"))

    def do_mov(self, kinds, operands):
        kind = kinds[-1]
        if kind == "b64" and len(operands) == 3:
            self.halves(operands)
            return
        found = REGISTER.match(operands[1])
        if kind.startswith("b") and found and found.group(1) in ("f", "fd"):
            self.put(operands[0], self.registers[operands[1]][self.who])
        else:
            self.put(operands[0], self.get(operands[1], kind))

    def halves(self, operands):
        """Take 64 bits apart, or put them together: ``mov.b64 {low, high}, whole`` and the reverse."""
        if operands[0].startswith("{"):
            low, high = operands[0].strip("{ "), operands[1].strip("} ")
            whole = self.registers[operands[2]][self.who].view(np.uint64)
            for target, part in ((low, whole & np.uint64(2**32 - 1)), (high, whole >> np.uint64(32))):
                if target != "%temp":
                    self.put(target, part.astype(np.uint32))
            return
        low, high = self.get(operands[1].strip("{ "), "u32"), self.get(operands[2].strip("} "), "u32")
        self.put(operands[0], low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32))

    # -- arithmetic ----------------------------------------------------------------------------------

    def two(self, kinds, operands):
        kind = kinds[-1]
        if kind in ("f32", "f64") and "rn" not in kinds and len(kinds) != 1:
            raise NotImplementedError(f"rounding of {kinds}")
        return self.get(operands[1], kind), self.get(operands[2], kind)

    def rounded(self, kinds):
        """Refuse float arithmetic whose rounding an assembler may choose, and so may fuse."""
        if kinds[-1] in ("f32", "f64") and kinds[:-1] != ["rn"]:
            raise NotImplementedError(f"arithmetic without a rounding of its own: {kinds}")

    def do_add(self, kinds, operands):
        self.rounded(kinds)
        a, b = self.two(kinds, operands)
        self.put(operands[0], a + b)

    def do_sub(self, kinds, operands):
        self.rounded(kinds)
        a, b = self.two(kinds, operands)
        self.put(operands[0], a - b)

    def do_mul(self, kinds, operands):
        a, b = self.two(kinds, operands)
        if kinds[0] == "wide":
            wider = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
            self.put(operands[0], a.astype(wider) * b.astype(wider))
        elif kinds[0] == "hi":
            bits = 8 * a.dtype.itemsize
            upper = (a.astype(object) * b.astype(object)) >> bits
            self.put(operands[0], np.array([int(v) % 2**bits for v in upper], f"u{a.dtype.itemsize}"))
        else:
            if kinds[0] != "lo":
                self.rounded(kinds)
            self.put(operands[0], a * b)

    def do_mad(self, kinds, operands):
        if kinds[-1].startswith("f"):
            raise NotImplementedError("a fused product and sum")
        a, b = self.two(kinds, operands)
        if kinds[0] == "wide":
            wider = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
            a, b = a.astype(wider), b.astype(wider)
        elif kinds[0] != "lo":
            raise NotImplementedError(f"mad.{kinds}")
        self.put(operands[0], a * b + self.get(operands[3], a.dtype))

    def do_div(self, kinds, operands):
        self.rounded(kinds)
        a, b = self.two(kinds, operands)
        if a.dtype.kind == "i":
            self.put(operands[0], (a - np.fmod(a, b)) // b)
        else:
            self.put(operands[0], a / b if a.dtype.kind == "f" else a // b)

    def do_rem(self, kinds, operands):
        a, b = self.two(kinds, operands)
        self.put(operands[0], np.fmod(a, b))

    def do_rcp(self, kinds, operands):
        self.rounded(kinds)
        a = self.get(operands[1], kinds[-1])
        self.put(operands[0], a.dtype.type(1) / a)

    def do_sqrt(self, kinds, operands):
        self.rounded(kinds)
        self.put(operands[0], np.sqrt(self.get(operands[1], kinds[-1])))

    def do_neg(self, kinds, operands):
        self.put(operands[0], -self.get(operands[1], kinds[-1]))

    def do_abs(self, kinds, operands):
        self.put(operands[0], np.abs(self.get(operands[1], kinds[-1])))

    def do_copysign(self, kinds, operands):
        a, b = self.two(kinds, operands)
        self.put(operands[0], np.copysign(b, a))

    def do_min(self, kinds, operands):
        self.put(operands[0], np.fmin(*self.two(kinds, operands)))

    def do_max(self, kinds, operands):
        self.put(operands[0], np.fmax(*self.two(kinds, operands)))

    def do_and(self, kinds, operands):
        a, b = self.two(kinds, operands)
        self.put(operands[0], a & b)

    def do_or(self, kinds, operands):
        a, b = self.two(kinds, operands)
        self.put(operands[0], a | b)

    def do_xor(self, kinds, operands):
        a, b = self.two(kinds, operands)
        self.put(operands[0], a ^ b)

    def do_bfi(self, kinds, operands):
        field, into = self.two(kinds, operands)
        at, count = (self.get(operand, "u32").astype(field.dtype) for operand in operands[3:5])
        ones = (field.dtype.type(1) << count) - field.dtype.type(1)
        self.put(operands[0], (into & ~(ones << at)) | ((field & ones) << at))

    def do_not(self, kinds, operands):
        self.put(operands[0], ~self.get(operands[1], kinds[-1]))

    def do_shl(self, kinds, operands):
        self.shift(np.left_shift, kinds, operands)

    def do_shr(self, kinds, operands):
        self.shift(np.right_shift, kinds, operands)

    def shift(self, how, kinds, operands):
        a, by = self.get(operands[1], kinds[-1]), self.get(operands[2], "u32")
        bits = np.uint32(8 * a.dtype.itemsize)
        held = how(a, np.minimum(by, bits - np.uint32(1)).astype(a.dtype))
        beyond = a >> (bits - 1).astype(a.dtype) if a.dtype.kind == "i" else np.zeros_like(a)
        self.put(operands[0], np.where(by < bits, held, beyond))

    # -- comparing and converting --------------------------------------------------------------------

    def do_setp(self, kinds, operands):
        if len(kinds) != 2:
            raise NotImplementedError(f"setp.{'.'.join(kinds)}")
        a, b = self.two(kinds[1:], operands)
        self.put(operands[0], _compared(kinds[0], a, b))

    def do_selp(self, kinds, operands):
        a, b = self.two(kinds, operands)
        self.put(operands[0], np.where(self.registers[operands[3]][self.who], a, b))

    def do_cvt(self, kinds, operands):
        to, of = TYPES[kinds[-2]], TYPES[kinds[-1]]
        value, rounding = self.get(operands[1], of), kinds[:-2]
        whole = len(rounding) == 1 and WHOLE.get(rounding[0])
        if of.kind == "f" and to.kind in "iu" and whole:
            self.put(operands[0], _integers(whole(value), to))
        elif of == to and whole:
            self.put(operands[0], whole(value))
        elif rounding in ([], ["rn"]) and not (of.kind == "f" and to.kind in "iu"):
            self.put(operands[0], value.astype(to))
        else:
            raise NotImplementedError(f"cvt.{'.'.join(kinds)}")


def _integers(whole, to):
    """Return whole floats as integers: the nearest there is, and 0 for NaN."""
    limits = np.iinfo(to)
    inside = (whole >= float(limits.min)) & (whole < float(limits.max) + 1.0)
    made = np.where(inside, whole, 0).astype(to)
    made[whole < float(limits.min)] = limits.min
    made[whole >= float(limits.max) + 1.0] = limits.max
    return made


def _as(value, dtype):
    """Return values as another dtype of registers: the same bits, cut off or extended as their kind says."""
    if value.dtype == dtype:
        return value
    if value.dtype.kind == "f" or dtype.kind == "f":
        if value.dtype.itemsize != dtype.itemsize:
            raise AssertionError(f"{value.dtype} as {dtype}")
        return value.view(dtype)
    if dtype.kind == "b" or value.dtype.kind == "b":
        raise AssertionError(f"{value.dtype} as {dtype}")
    if value.dtype.kind == "i" and dtype.itemsize > value.dtype.itemsize:
        return value.astype(f"i{dtype.itemsize}").view(dtype)
    return value.astype(f"u{dtype.itemsize}").view(dtype)


def _compared(how, a, b):
    plain = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if a.dtype.kind != "f":
        return {**plain, "lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b}[how]
    unordered = np.isnan(a) | np.isnan(b)
    if how in ("num", "nan"):
        return unordered if how == "nan" else ~unordered
    if how.endswith("u"):
        return plain[how[:-1]] | unordered
    return plain[how] & ~unordered

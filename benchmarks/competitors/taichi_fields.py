"""Taichi on the CPU: fields and kernels."""

import taichi as ti
from workloads import DT, KEEP, REACH, WIDTH, I, chances

DT, KEEP, REACH, WIDTH = float(DT), float(KEEP), float(REACH), float(WIDTH)


def field(column, kind):
    made = ti.field(kind, shape=len(column))
    made.from_numpy(column)
    return made


@ti.data_oriented
class Taichi:
    def __init__(self, *columns, cores):
        ti.init(arch=ti.cpu, cpu_max_num_threads=cores, random_seed=1, log_level=ti.ERROR)
        self.fields = [field(c, ti.f32 if c.dtype.kind == "f" else ti.u8) for c in columns]

    def step(self, steps):
        for _ in range(steps):
            self.kernel(*self.fields)
        ti.sync()

    def columns(self):
        return tuple(f.to_numpy() for f in self.fields)


class Integrate(Taichi):
    @ti.kernel
    def kernel(self, x: ti.template(), y: ti.template(), vx: ti.template(), vy: ti.template()):
        for i in x:
            x[i] += vx[i] * DT
            y[i] += vy[i] * DT
            vx[i] *= KEEP
            vy[i] *= KEEP


@ti.func
def reflect(z):
    z = ti.abs(z)
    return ti.min(z, 2 * WIDTH - z)


class Walk(Taichi):
    @ti.kernel
    def kernel(self, x: ti.template(), y: ti.template()):
        for i in x:
            x[i] = reflect(x[i] + REACH * (2 * ti.random() - 1))
            y[i] = reflect(y[i] + REACH * (2 * ti.random() - 1))


class Sir(Taichi):
    @ti.kernel
    def infectious(self, state: ti.template()) -> ti.i32:
        count = 0
        for i in state:
            count += ti.cast(state[i] == I, ti.i32)
        return count

    @ti.kernel
    def progress(self, state: ti.template(), p: ti.f32, gamma: ti.f32):
        for i in state:
            u = ti.random()
            if (state[i] == 0 and u < p) or (state[i] == 1 and u < gamma):
                state[i] += ti.u8(1)

    def kernel(self, state):
        self.progress(state, *chances(self.infectious(state), state.shape[0]))

from kernels import *

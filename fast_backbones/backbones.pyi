from backbones import *

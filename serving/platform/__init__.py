"""Every Ray Serve call."""

from serving.platform.serve import CRITIC, PlatformConfig, ServePlatform

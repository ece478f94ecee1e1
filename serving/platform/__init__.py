"""Every call to Ray Serve."""

from serving.platform.serve import CRITIC, PlatformConfig, ServePlatform

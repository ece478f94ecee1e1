"""`seatrial up`, `status`, `down`: Ray, MLflow and a gateway as a service on this machine."""

from cluster.service.gateway import servable_run
from cluster.service.service import (
    PartStatus,
    Service,
    ServicePorts,
    UpRequest,
    down,
    load_service,
    service_file,
    start_ui,
    status,
    up,
)

"""What coordinator and site share for being watched: alerts, an endpoint for Prometheus, structured logs."""

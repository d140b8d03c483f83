"""An Airflow DAG (2.4 or newer) that works off deletion requests every night on a Ray cluster: for the DAG folder.

`ofmu requests process` may be retried at any time: it goes on where it was, and a second one gives way.
Yours to change: the paths, the connection that holds the master key, the cluster's address.
"""

from datetime import datetime, timedelta

from airflow import DAG
from airflow.operators.bash import BashOperator

with DAG(
    dag_id="ofmu_requests",
    schedule="15 1 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 3, "retry_delay": timedelta(minutes=10), "execution_timeout": timedelta(hours=20)},
):
    process = BashOperator(
        task_id="process",
        bash_command="cd /srv/ofmu && .venv/bin/ofmu requests process --config requests.yaml",
        env={"RAY_ADDRESS": "ray-head:6379", "OFMU_MASTER_KEY": "{{ conn.ofmu_master_key.password }}"},
        append_env=True,
    )
    audit = BashOperator(
        task_id="audit",
        bash_command="cd /srv/ofmu && .venv/bin/ofmu requests audit --config requests.yaml",
    )
    audit >> process

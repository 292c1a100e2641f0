"""Comments of the manifests: what each file is for, and why it is as it is."""

PLACEHOLDER = "REPLACE_ME"
WRITTEN = "Written by: python -m infra.k8s.generate. Change infra/nodes.py or infra/k8s/*.py, and write it anew."

CLUSTER_FOLDER = """\
The lasting Ray cluster:
  kubectl apply -k FOLDER
In an overlay of your own, `images` gives the registry:
  images: [{name: dubito, newName: REGISTRY/dubito}]"""

STORAGE = """\
Where data, runs and predictions lie. Fill in the bucket, its endpoint and its region; keys: secret.example.yaml."""

CONFIGS = """\
Settings files, mounted at /etc/dubito in every pod. train.yaml is an example (BCCD, anchor_free); the jobs give
`data` and `out` with --set. retrain.yaml is the example of `dubito retrain`, whose places are --set too."""

RAYCLUSTER = """\
A Ray cluster that stays, for `dubito VERB ... --submit`. It is only its head until a job asks for more.
- KubeRay >= 1.6 makes a token (Secret `dubito`, key auth_token) and gives it to every Ray container.
- The head has no CPUs for tasks: what eats all memory must not take the control plane with it.
- DUBITO_GROWS says how far it may grow: a job plans by what is there, so it asks for what it wants and waits for it.
- Autoscaler version v2; a worker that is idle for ten minutes is given back.
- Requests are limits, and a CPU and some memory less than the machine's, or no pod would fit on it.
- /dev/shm holds Ray's object store. It counts as memory of the pod."""

RAYJOB = """\
dubito {verb} as a job of its own:
  kubectl apply -f infra/k8s/jobs/{verb}.yaml           # once more: kubectl replace --force -f ...
Edit the arguments; $DUBITO_ROOT comes from the ConfigMap dubito-storage, and the shell fills it in.
- The cluster is made for the job, as large as it wants from its start (a job plans by what is there), and goes ten
  minutes after it. Pods that are lost are replaced.
- K8sJobMode: a Kubernetes Job hands the command in and follows the log. If its pod is lost, the next one finds the
  job by its id and follows on; the job itself does not notice. (A submitter inside the head would go with the head.)
- backoffLimit: a job that failed is started again, on a new cluster. That is right since {again}.
  Wrong input (exit code 2) is tried again too, and fails as fast as the first time."""

JOBS_FOLDER = """\
For overlays. All jobs at once is hardly ever what one wants; choose one by its label:
  kubectl apply -k FOLDER -l dubito/verb=train"""

RAYCRONJOB = """\
dubito retrain every night, on a cluster that is made for it and goes with it.
ALPHA: KubeRay >= 1.6, and its operator started with the feature gate RayCronJob:
  helm install kuberay-operator kuberay/kuberay-operator --set 'featureGates[0].name=RayCronJob' \\
    --set 'featureGates[0].enabled=true'
There is no concurrencyPolicy yet: two runs may overlap. The retrain's own lock lets one of them work. cronjob.yaml
needs no gate; use one of the two."""

CRONJOB = """\
dubito retrain every night, sent to the lasting Ray cluster (cluster/raycluster.yaml).
- The run is named after the Kubernetes Job, which is named after the scheduled time: a pod that is started again
  sends the same name, which is the same run, and follows it. `kubectl create job --from=cronjob/dubito-retrain
  retrain-now` is a run of its own.
- The pod follows the run to its end, so concurrencyPolicy: Forbid means that no two runs overlap.
- The token is the one that KubeRay made for the cluster."""

SCHEDULE_FOLDER = """\
The schedule that every Kubernetes can run; raycronjob.yaml is the other one, behind a feature gate."""

CLAIM = """\
Storage without S3: a volume that all nodes mount at once. Its storage class has to offer ReadWriteMany (NFS, CephFS,
EFS, Filestore); add storageClassName where the default one does not."""

COMPONENT = """\
Everything on the volume: /data in every Ray pod, and $DUBITO_ROOT is /data."""

SECRET = """\
EXAMPLE, not applied by any kustomization. The keys of the storage; better made without a file:
  kubectl create secret generic dubito-s3 --from-literal=AWS_ACCESS_KEY_ID=... --from-literal=AWS_SECRET_ACCESS_KEY=...
Not needed where a service account's role gives access."""

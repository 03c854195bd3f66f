{{- define "kf.name" -}}
{{- if gt (len .Release.Name) 40 }}{{ fail "the release's name may have 40 characters: names of pods and certificates are made of it" }}{{ end -}}
{{- .Release.Name -}}
{{- end }}

{{- define "kf.selector" -}}
app.kubernetes.io/name: kevlarflow
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kf.labels" -}}
{{ include "kf.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "kf.tls" -}}{{ if ne .Values.certificates.mode "none" }}yes{{ end }}{{- end }}
{{- define "kf.scheme" -}}{{ if include "kf.tls" . }}https{{ else }}http{{ end }}{{- end }}
{{- define "kf.ca" -}}{{ if eq .Values.certificates.mode "certManager" }}ca.crt{{ else }}ca.pem{{ end }}{{- end }}
{{- define "kf.adminPort" -}}{{ .Values.settings.admin_port | default 8100 }}{{- end }}
{{- define "kf.gatewayPort" -}}{{ .Values.settings.gateway_port | default 8000 }}{{- end }}
{{- /* One process of ours listens in a pod, so that each kind has one port. */ -}}
{{- define "kf.controllerPort" -}}{{ .Values.settings.controller_ports | default "7000" }}{{- end }}
{{- define "kf.nodePort" -}}{{ .Values.settings.node_ports | default "7100" }}{{- end }}
{{- define "kf.linkPort" -}}{{ .Values.settings.link_ports | default "7200" }}{{- end }}
{{- define "kf.stages" -}}{{ .Values.settings.stages | default 4 }}{{- end }}
{{- define "kf.pods" -}}
{{- $instances := .Values.nodes.instances | default (.Values.settings.instances | default 2) -}}
{{ add $instances (.Values.settings.spares | default 0) }}
{{- end }}

{{- define "kf.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ if and .Values.nodes.gpus (not .Values.image.tag) }}-cuda{{ end }}
{{- end -}}
{{- end }}

{{- /* What all pods share: kfadmin pod run reads it (controlplane/kfadmin/pod/place.py). */ -}}
{{- define "kf.plan" -}}
{{- $name := include "kf.name" . -}}
{{- $inside := printf "%s.svc" .Release.Namespace -}}
{{- $scheme := include "kf.scheme" . -}}
{{- $members := dict -}}
{{- $endpoints := .Values.etcd.endpoints -}}
{{- if not $endpoints -}}
{{- range $i := until (int .Values.etcd.replicas) -}}
{{- $host := printf "%s-etcd-%d.%s-etcd.%s" $name $i $name $inside -}}
{{- $_ := set $members (printf "e%d" $i) $host -}}
{{- $endpoints = append $endpoints (printf "%s:2379" $host) -}}
{{- end -}}
{{- end -}}
{{- $admin := list -}}
{{- range $i := until (int .Values.controllers.replicas) -}}
{{- $admin = append $admin (printf "%s://%s-controller-%d.%s-controller.%s:%s" $scheme $name $i $name $inside (include "kf.adminPort" $)) -}}
{{- end -}}
{{- $domains := dict -}}
{{- range .Values.faultDomains }}{{ $_ := set $domains .name .nodeLabel }}{{ end -}}
{{- $tls := dict -}}
{{- if include "kf.tls" . -}}
{{- $folder := "/etc/kevlarflow/certs" -}}
{{- $_ := set $tls "ca" (printf "%s/%s" $folder (include "kf.ca" .)) -}}
{{- if eq .Values.certificates.mode "certManager" -}}
{{- $_ := set $tls "cert" (printf "%s/tls.crt" $folder) -}}
{{- $_ := set $tls "key" (printf "%s/tls.key" $folder) -}}
{{- else -}}
{{- $_ := set $tls "cert" (printf "%s/{process}.pem" $folder) -}}
{{- end -}}
{{- $cluster := .Values.settings.cluster | default "kevlarflow" -}}
{{- $_ := set $tls "etcd_name" (ternary .Values.etcd.serverName (printf "etcd.%s.internal" $cluster) (not (empty .Values.etcd.endpoints))) -}}
{{- end -}}
{{- $https := list "" "" -}}
{{- if .Values.gateways.httpsSecret }}{{ $https = list "/etc/kevlarflow/https/tls.crt" "/etc/kevlarflow/https/tls.key" }}{{ end -}}
{{- $ports := dict "controller_ports" (include "kf.controllerPort" .) "node_ports" (include "kf.nodePort" .) "link_ports" (include "kf.linkPort" .) -}}
{{- dict "settings" (merge (deepCopy .Values.settings) $ports) "etcd" $endpoints "etcd_members" $members "admin" $admin
  "gateways" (list (printf "%s://%s-gateway.%s:%v" $scheme $name $inside .Values.gateways.service.port))
  "tls" $tls "https" $https "fault_domains" $domains "insecure" (not (include "kf.tls" .)) | toPrettyJson -}}
{{- end }}

{{- /* oidc.toml of the controllers (controlplane/contract/oidc.py). JSON's strings and lists of them are TOML's as well. */ -}}
{{- define "kf.oidc" -}}
{{- $o := .Values.oidc -}}
issuer = {{ $o.issuer | toJson }}
client_id = {{ $o.clientId | toJson }}
redirect_urls = {{ $o.redirectUrls | toJson }}
provider = {{ $o.provider | toJson }}
client_secret_file = {{ ternary "client-secret" "" (not (empty $o.clientSecret.name)) | toJson }}
ca_file = {{ ternary "ca.crt" "" (not (empty $o.ca.name)) | toJson }}
proxy = {{ $o.proxy | toJson }}
scopes = {{ $o.scopes | toJson }}
roles_claim = {{ $o.rolesClaim | toJson }}
name_claim = {{ $o.nameClaim | toJson }}
session_s = {{ $o.sessionSeconds | int }}

[roles]
viewer = {{ $o.roles.viewer | default list | toJson }}
operator = {{ $o.roles.operator | default list | toJson }}
{{- end }}

{{- define "kf.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.user }}
runAsGroup: {{ .Values.podSecurity.user }}
fsGroup: {{ .Values.podSecurity.user }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kf.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "kf.env" -}}
- {name: KF_RUN_DIR, value: /var/lib/kevlarflow/run}
- {name: KF_POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: KF_POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
- {name: KF_POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: KF_NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
{{- end }}

{{- /* dict root role: where a pod of that role finds its files. */ -}}
{{- define "kf.mounts" -}}
- {name: plan, mountPath: /etc/kevlarflow/plan.json, subPath: plan.json, readOnly: true}
- {name: state, mountPath: /var/lib/kevlarflow}
- {name: tmp, mountPath: /tmp}
{{- if include "kf.tls" .root }}
- {name: certs, mountPath: /etc/kevlarflow/certs, readOnly: true}
{{- end }}
{{- if ne .role "etcd" }}
- {name: credentials, mountPath: /etc/kevlarflow/credentials, readOnly: true}
{{- end }}
{{- if and .root.Values.model.volume (has .role (list "node" "gateway")) }}
- {name: model, mountPath: {{ .root.Values.model.mountPath | quote }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "kf.volumes" -}}
{{- $name := include "kf.name" .root -}}
- name: plan
  configMap: {name: {{ $name }}-plan}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
{{- if include "kf.tls" .root }}
- name: certs
  secret: {secretName: {{ $name }}-{{ .role }}-certs, defaultMode: 0440}
{{- end }}
{{- if ne .role "etcd" }}
- name: credentials
  secret: {secretName: {{ .root.Values.secrets.credentials | default (printf "%s-credentials" $name) }}, defaultMode: 0440}
{{- end }}
{{- if and .root.Values.model.volume (has .role (list "node" "gateway")) }}
- name: model
  {{- toYaml .root.Values.model.volume | nindent 2 }}
{{- end }}
{{- end }}

{{- /* dict root role values: what all pods have beside their containers and volumes. */ -}}
{{- define "kf.podSpec" -}}
securityContext:
  {{- include "kf.podSecurity" .root | nindent 2 }}
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "kf.annotations" -}}
checksum/plan: {{ include "kf.plan" .root | sha256sum }}
{{- with .values.annotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* dict root role: one such pod on a machine if possible, and evenly over fault domains. */ -}}
{{- define "kf.apart" -}}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "kf.selector" .root | nindent 12 }}
            app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- define "kf.spread" -}}
{{- range .root.Values.faultDomains }}
- topologyKey: {{ .nodeLabel }}
  maxSkew: 1
  whenUnsatisfiable: {{ $.when }}
  labelSelector:
    matchLabels:
      {{- include "kf.selector" $.root | nindent 6 }}
      {{- toYaml $.match | nindent 6 }}
{{- end }}
{{- end }}

{{- define "kf.check" -}}
{{- $v := .Values -}}
{{- $device := dig "engine" "device" "cpu" $v.settings -}}
{{- if and $v.nodes.gpus (ne $device "cuda") }}{{ fail "nodes.gpus is not 0: settings.engine.device has to be cuda" }}{{ end -}}
{{- if and (not $v.nodes.gpus) (eq $device "cuda") }}{{ fail "settings.engine.device is cuda: nodes.gpus has to be 1 or more" }}{{ end -}}
{{- if and (eq $v.certificates.mode "certManager") (not $v.certificates.issuer.name) }}{{ fail "certificates.mode is certManager: certificates.issuer.name has to name an issuer with an authority of this cluster's own" }}{{ end -}}
{{- if and $v.gateways.httpsSecret (eq $v.certificates.mode "none") }}{{ fail "gateways.httpsSecret needs certificates.mode secrets or certManager" }}{{ end -}}
{{- if and $v.settings.model (hasPrefix "/" $v.settings.model) (not $v.model.volume) }}{{ fail "settings.model is a path: model.volume has to say where it is" }}{{ end -}}
{{- if $v.oidc.issuer -}}
{{- if not $v.oidc.clientId }}{{ fail "oidc.issuer is set: oidc.clientId has to be what the provider calls this cluster" }}{{ end -}}
{{- if not $v.oidc.redirectUrls }}{{ fail "oidc.issuer is set: oidc.redirectUrls has to have https://HOST:PORT/oidc/callback of each address of the dashboard" }}{{ end -}}
{{- if and $v.networkPolicy.enabled (not $v.networkPolicy.egress) }}{{ fail "oidc.issuer is set: networkPolicy.egress has to let controllers go to the provider" }}{{ end -}}
{{- end -}}
{{- if gt (int $v.autoscaling.min) (int $v.autoscaling.max) }}{{ fail "autoscaling.min is more than autoscaling.max" }}{{ end -}}
{{- end }}

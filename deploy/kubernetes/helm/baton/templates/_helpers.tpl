{{- define "baton.name" -}}
{{- if contains "baton" .Release.Name -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}{{ printf "%s-baton" .Release.Name | trunc 40 | trimSuffix "-" }}{{- end -}}
{{- end }}

{{- define "baton.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}

{{- define "baton.labels" -}}
app.kubernetes.io/name: baton
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "baton.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- /* What routers and the launcher mount: the options, and secrets. */ -}}
{{- define "baton.secretMounts" -}}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/baton/tls, readOnly: true}
{{- end }}
{{- if .Values.tenants.existingSecret }}
- {name: tenants, mountPath: /etc/baton/tenants, readOnly: true}
{{- end }}
{{- end }}

{{- define "baton.secretVolumes" -}}
{{- if .Values.tls.existingSecret }}
- name: tls
  secret: {secretName: {{ .Values.tls.existingSecret }}, defaultMode: 0440}
{{- end }}
{{- if .Values.tenants.existingSecret }}
- name: tenants
  secret: {secretName: {{ .Values.tenants.existingSecret }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "baton.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- end }}

{{- /* A worker group. Takes root, group, pods, servers (that show metrics), values, shmGiB, gpus, isRouter. */ -}}
{{- define "baton.group" -}}
- groupName: {{ .group }}
  replicas: {{ .values.pods }}
  minReplicas: {{ .values.pods }}
  maxReplicas: {{ .values.pods }}
  rayStartParams:
    resources: {{ printf "'\"{\\\"baton-%s\\\": 1}\"'" .group }}
    num-cpus: {{ .values.cpu | quote }}
    object-store-memory: "134217728"  # Ray's own, which nothing of Baton's goes through
    disable-usage-stats: "true"
  template:
    metadata:
      labels:
        {{- include "baton.labels" .root | nindent 8 }}
        app.kubernetes.io/component: {{ .group }}
    spec:
      terminationGracePeriodSeconds: {{ if .isRouter }}{{ add .values.drainSeconds 30 }}{{ else }}60{{ end }}
      automountServiceAccountToken: false
      securityContext: {{ toJson .root.Values.podSecurityContext }}
      {{- include "baton.pullSecrets" .root | nindent 6 }}
      {{- include "baton.placement" .values | nindent 6 }}
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels: {app.kubernetes.io/instance: {{ .root.Release.Name }}, app.kubernetes.io/component: {{ .group }}}
      containers:
        - name: ray-worker
          image: {{ include "baton.image" .root }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          securityContext:
            {{- include "baton.containerSecurity" .root | nindent 12 }}
          resources:
            requests: {cpu: {{ .values.cpu | quote }}, memory: {{ .values.memoryGiB }}Gi}
            limits:
              memory: {{ .values.memoryGiB }}Gi
              {{- if .gpus }}
              nvidia.com/gpu: {{ .gpus }}
              {{- end }}
          ports:
            {{- if .isRouter }}
            - {name: grpc, containerPort: {{ .values.grpcPort }}}
            - {name: http, containerPort: {{ .values.httpPort }}}
            {{- end }}
            {{- range $n := until (int .servers) }}
            - {name: metrics-{{ $n }}, containerPort: {{ add $.root.Values.metrics.port $n }}}
            {{- end }}
          livenessProbe:  # Ray's own process; Ray looks after the servers in it
            exec: {command: [pgrep, -x, raylet]}
            initialDelaySeconds: 30
            periodSeconds: 10
            failureThreshold: 6
          readinessProbe:
            {{- if .isRouter }}
            httpGet: {path: /ready, port: http{{ if .root.Values.tls.existingSecret }}, scheme: HTTPS{{ end }}}
            {{- else }}
            httpGet: {path: /metrics, port: metrics-1}  # the first node opens it when it is warm; the store has 0
            {{- end }}
            periodSeconds: 5
            failureThreshold: 2
          lifecycle:
            preStop:  # Endpoints forget the pod meanwhile{{ if .isRouter }}, and requests that run end{{ end }}
              exec: {command: [sleep, {{ if .isRouter }}{{ .values.drainSeconds | quote }}{{ else }}"5"{{ end }}]}
          volumeMounts:
            - {name: shm, mountPath: /dev/shm}
            - {name: models, mountPath: /models, readOnly: true}
            {{- if .isRouter }}
            {{- include "baton.secretMounts" .root | nindent 12 }}
            {{- end }}
      volumes:
        - name: shm
          emptyDir: {medium: Memory, sizeLimit: {{ .shmGiB }}Gi}
        - name: models
          {{- range $kind, $source := .root.Values.model.volume }}
          {{ $kind }}: {{ toJson $source }}
          {{- else }}
          persistentVolumeClaim: {claimName: {{ .root.Values.model.claimName }}, readOnly: true}
          {{- end }}
        {{- if .isRouter }}
        {{- include "baton.secretVolumes" .root | nindent 8 }}
        {{- end }}
{{- end }}

{{- define "procession.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "procession.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "procession.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "procession.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "procession.agent" -}}{{ include "procession.fullname" . }}-agent{{- end -}}
{{- define "procession.collector" -}}{{ include "procession.fullname" . }}-collector{{- end -}}
{{- define "procession.ca" -}}{{ include "procession.fullname" . }}-ca{{- end -}}
{{- define "procession.caKey" -}}{{ include "procession.fullname" . }}-ca-key{{- end -}}

{{/* Names of cluster-wide objects: two releases in two namespaces do not meet. */}}
{{- define "procession.clusterwide" -}}
{{- if eq .Release.Namespace "procession-system" -}}
{{- include "procession.fullname" . -}}
{{- else -}}
{{- printf "%s-%s" (include "procession.fullname" .) .Release.Namespace | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What the collector's certificate says, whatever address agents use. */}}
{{- define "procession.serverName" -}}{{ include "procession.collector" . }}.{{ .Release.Namespace }}.svc{{- end -}}

{{- define "procession.audience" -}}
{{- default (printf "%s.%s.collector" .Release.Name .Release.Namespace) .Values.collector.auth.audience -}}
{{- end -}}

{{/* The variable that every container of the namespace has for the Service. */}}
{{- define "procession.serviceHost" -}}
{{- printf "%s_SERVICE_HOST" (include "procession.collector" . | upper | replace "-" "_") -}}
{{- end -}}

{{- define "procession.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "procession.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "procession.selector" -}}
app.kubernetes.io/name: {{ include "procession.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* An image of .image, with the chart's version unless it says otherwise. */}}
{{- define "procession.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end -}}

{{- define "procession.priorityClass" -}}
{{- if .Values.agent.priorityClassName -}}
{{- .Values.agent.priorityClassName -}}
{{- else if .Values.priorityClass.create -}}
{{- include "procession.clusterwide" . -}}-agent
{{- end -}}
{{- end -}}

{{/*
Whether the collector gets a volume: "true" or "". A StatefulSet cannot change
that, so one that is there decides; then the value; then whether the cluster has
a default storage class.
*/}}
{{- define "procession.persistent" -}}
{{- $p := .Values.collector.persistence.enabled | toString -}}
{{- if .Values.collector.database.secretName -}}
{{- else if eq $p "true" -}}true
{{- else if eq $p "auto" -}}
  {{- $have := lookup "apps/v1" "StatefulSet" .Release.Namespace (include "procession.collector" .) -}}
  {{- if $have -}}
    {{- if $have.spec.volumeClaimTemplates -}}true{{- end -}}
  {{- else if .Values.collector.persistence.storageClassName -}}true
  {{- else -}}
    {{- $found := "" -}}
    {{- range (lookup "storage.k8s.io/v1" "StorageClass" "" "").items -}}
      {{- if eq (dig "metadata" "annotations" "storageclass.kubernetes.io/is-default-class" "" .) "true" -}}
        {{- $found = "true" -}}
      {{- end -}}
    {{- end -}}
    {{- $found -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{- define "procession.podLookup" -}}
{{- $p := .Values.collector.auth.podLookup | toString -}}
{{- if eq $p "true" -}}true
{{- else if and (eq $p "auto") (semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version) -}}true
{{- end -}}
{{- end -}}

{{- define "procession.agentPort" -}}{{ regexFind "[0-9]+$" .Values.agent.metricsAddress }}{{- end -}}
{{- define "procession.agentHost" -}}
{{- $h := regexReplaceAll ":[0-9]+$" .Values.agent.metricsAddress "" -}}
{{- if or (eq $h "") (eq $h "0.0.0.0") (eq $h "[::]") -}}127.0.0.1{{- else -}}{{ $h | trimPrefix "[" | trimSuffix "]" }}{{- end -}}
{{- end -}}

{{- define "procession.crdHook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
